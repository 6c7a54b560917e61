"""All DAGs: a set for each domain file in the configured folder, and two for all domains."""

from __future__ import annotations

# An airflow dag is looked for in files with these two words.
from dags import backfill, compressor, daily, ranker, settings, transfer

held = settings.load()
for domain, file in held.domain_files.items():
    for make in (daily.daily, compressor.compressor, ranker.ranker):
        dag = make(held, domain, file)
        globals()[dag.dag_id] = dag
for make_one in (backfill.backfill, transfer.transfer):
    dag = make_one(held)
    globals()[dag.dag_id] = dag
