"""Job runs as OpenLineage events, through the public client, where one is configured.

The client's own settings say where events go: OPENLINEAGE_URL, OPENLINEAGE_CONFIG, the variables
OPENLINEAGE__..., or a file openlineage.yml here or in ~/.openlineage. Without any of them nothing
is loaded and nothing is sent. https://openlineage.io/docs/client/python
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pipelines.places import shown, shown_in

if TYPE_CHECKING:
    from openlineage.client.client import OpenLineageClient

log = logging.getLogger(__name__)

VARIABLES = ("OPENLINEAGE_URL", "OPENLINEAGE_CONFIG", "OPENLINEAGE__")
FILES = (Path("openlineage.yml"), Path("~/.openlineage/openlineage.yml"))
PRODUCER = "instance-as-token"
CLOSE_S = 10.0
"""What a transport that sends in the background may still take when the run has ended."""
INSTALL = "pip install 'instance-as-token[lineage]'"


class Events:
    """The events of one run of a job: START, then COMPLETE or FAIL.

    What goes wrong in sending is logged, and the first failure ends the sending: a run never fails
    for it. Datasets are tables (namespace: the lake; facet: the version) and the raw log; no
    credential of a place is in any event.
    """

    def __init__(self, lake: str, job: str, run: str, domain: str = "") -> None:
        self.run = run
        self.namespace = shown(lake) if "://" in lake else Path(lake).resolve().as_uri()
        self.job = f"{job}.{Path(domain).stem}" if domain else job
        self._client = _client() if is_configured() else None

    def start(self) -> None:
        self._send("START", {}, {})

    def end(self, inputs: Mapping[str, Any], outputs: Mapping[str, int], error: str | None) -> None:
        """Args: versions by table; an input that is no version is the place of a raw log."""
        if error is None:
            self._send("COMPLETE", inputs, outputs)
        else:
            self._send("FAIL", inputs, outputs, error)
        if self._client is None:
            return
        try:
            self._client.close(CLOSE_S)
        except Exception as caught:
            _warn(caught)

    def _send(
        self, state: str, inputs: Mapping[str, Any], outputs: Mapping[str, int], error: str = ""
    ) -> None:
        if self._client is None:
            return
        try:
            self._client.emit(self._event(state, inputs, outputs, error))
        except Exception as caught:  # whatever a transport raises
            _warn(caught)
            self._client = None

    def _event(
        self, state: str, inputs: Mapping[str, Any], outputs: Mapping[str, int], error: str
    ) -> Any:
        from openlineage.client import event_v2 as events
        from openlineage.client.facet_v2 import dataset_version_dataset, error_message_run

        def named(kind: Any, name: str, version: Any) -> Any:
            if not isinstance(version, int):
                namespace, name = place(str(version))
                return kind(namespace=namespace, name=name)
            facet = dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=str(version))
            return kind(namespace=self.namespace, name=name, facets={"version": facet})

        message = error_message_run.ErrorMessageRunFacet(
            message=shown_in(error), programmingLanguage="Python"
        )
        return events.RunEvent(
            eventType=events.RunState[state],
            eventTime=datetime.now(UTC).isoformat(),
            run=events.Run(
                runId=str(uuid.UUID(self.run)), facets={"errorMessage": message} if error else {}
            ),
            job=events.Job(namespace=self.namespace, name=self.job),
            producer=PRODUCER,
            inputs=[named(events.InputDataset, *item) for item in inputs.items()],
            outputs=[named(events.OutputDataset, *item) for item in outputs.items()],
        )


def is_configured() -> bool:
    """Whether the client's own settings are there; OPENLINEAGE_DISABLED=true says no."""
    if os.environ.get("OPENLINEAGE_DISABLED", "").strip().lower() == "true":
        return False
    is_set = any(os.environ[name] for name in os.environ if name.startswith(VARIABLES))
    return is_set or any(path.expanduser().is_file() for path in FILES)


def _client() -> OpenLineageClient | None:
    try:
        from openlineage.client import OpenLineageClient

        return OpenLineageClient()
    except ImportError:
        log.warning("OpenLineage is configured and its client is not installed: %s", INSTALL)
    except Exception as caught:  # settings that no transport takes
        _warn(caught)
    return None


def _warn(caught: Exception) -> None:
    log.warning("the lineage events of this run are not all sent: %s", shown_in(str(caught)))


def place(where: str) -> tuple[str, str]:
    """(namespace, name) of a path or a URI, as OpenLineage names places."""
    if "://" not in where:
        return "file", str(Path(where).resolve())
    parts = urlsplit(shown(where))
    return f"{parts.scheme}://{parts.netloc}", parts.path
