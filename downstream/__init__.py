"""Stage 2: tokens fetched by timestamp, and the rankers that read them."""
