"""The draft-gateway as a whole: its parts, the order in which they start and stop, and whether it is ready."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fastapi import FastAPI

from services.draft_gateway.app import create_app
from services.draft_gateway.drafting import DraftEngine, Drafter, LoadedDraft, load_draft_engine
from services.draft_gateway.link.client import LinkUplink
from services.draft_gateway.link.server import LinkServer
from services.draft_gateway.sessions import Sessions
from services.draft_gateway.settings import GatewaySettings, UplinkKind
from services.draft_gateway.uplink import Uplink
from shared.errors import ModelFilesError, OutriderError, Unavailable
from shared.http import Readiness
from shared.text import Tokenizer

logger = logging.getLogger(__name__)

START_PAUSE_S: Final = 1.0


def make_uplink(settings: GatewaySettings) -> Uplink:
    """The uplink that the settings name. At the edge neither Kafka's nor Redis' client need be installed.

    Raises `OutriderError` when it is to be a link and none is named.
    """
    if settings.uplink is UplinkKind.LINK:
        if not settings.link_urls:
            raise OutriderError("OUTRIDER_UPLINK=link needs OUTRIDER_LINK=ws://HOST:PORT/v1/link")
        return LinkUplink(settings)
    from services.draft_gateway.kafka_uplink import KafkaUplink

    return KafkaUplink(settings, name=settings.gateway_name, lease_s=settings.lease_s)


class DraftGateway:
    """One gateway process. `app` is its HTTP side; `serve` does the rest."""

    def __init__(
        self, settings: GatewaySettings, *, uplink: Uplink | None = None, engine: DraftEngine | None = None
    ) -> None:
        """Load tokenizer and draft engine (or take `engine`); ModelFilesError when the target's files are not there."""
        if not settings.model:
            raise ModelFilesError(
                "no target model: set OUTRIDER_MODEL to its directory (Hugging Face layout); the gateway needs its "
                "tokenizer"
            )
        self._tokenizer = Tokenizer.load(settings.model)
        loaded = load_draft_engine(settings) if engine is None else LoadedDraft(engine)
        self._drafter = Drafter(loaded.engine)
        self._uplink = uplink or make_uplink(settings)
        in_cloud = settings.uplink is UplinkKind.KAFKA
        self._links = LinkServer(settings, self._uplink) if in_cloud else None
        self._sessions = Sessions(
            settings,
            uplink=self._uplink,
            drafter=self._drafter,
            tokenizer=self._tokenizer,
            foresight=loaded.foresight,
        )
        self._notes = loaded.notes
        self.app: Final[FastAPI] = create_app(settings, self._sessions, self.readiness, links=self._links)

    async def readiness(self) -> Readiness:
        """Why it can't serve now, and what an operator should know."""
        await self._uplink.probe()
        missing = list(self._uplink.troubles())
        if self._sessions.stopping:
            missing.append("the gateway is stopping")
        linked = self._links.notes() if self._links is not None else ()
        return Readiness(missing=missing, notes=(*self._notes, *self._uplink.notes(), *linked))

    async def serve(self, stop: asyncio.Event) -> None:
        """Connect, as soon as broker and store are there, and serve until `stop`; streams in flight are detached."""
        connecting = asyncio.create_task(self._connect())
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({connecting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if connecting.done():
                connecting.result()
            await stopping
            if self._links is not None:
                await self._links.stop()
            await self._sessions.stop()
        finally:
            connecting.cancel()
            stopping.cancel()
            await asyncio.gather(connecting, stopping, return_exceptions=True)
            await self._uplink.stop()
            self._drafter.close()

    async def _connect(self) -> None:
        while True:
            try:
                await self._uplink.start()
                return
            except Unavailable as error:
                logger.warning("not ready yet: %s", error)
                await asyncio.sleep(START_PAUSE_S)
