"""What the data is and how it changes: tables, days, domain files, DataFrame -> DataFrame
functions."""
