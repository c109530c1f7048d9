"""The ClientApp: the rim between Flower and an institution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.institution import Institution
from common.errors import Refusal
from common.flower import HELLO, ROUND, SECURE, from_records, to_records
from common.messages import INTERNAL_ERROR, MALFORMED, Refused, Request
from common.wire import from_wire, to_wire

log = logging.getLogger("silotune.client")


def build_client_app(institution_of: Callable[[Context], AbstractContextManager[Institution]]) -> ClientApp:
    """A ClientApp that lets the institution answer that `institution_of(context)` opens, one message each time.

    Flower sends the text of an exception to the coordinator as it is, so nothing may escape from here: whatever
    fails, even finding the institution, is answered with a reason code.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            request = from_wire(from_records(message.content))
            if not isinstance(request, Request):
                raise Refusal(MALFORMED, "a reply came where a request was expected")
            with institution_of(context) as institution:
                answer = institution.answer(request)
        except Refusal as refusal:
            log.warning("refused: %s", refusal)
            answer = Refused(refusal.reason)
        except Exception:
            log.exception("no answer could be made")
            answer = Refused(INTERNAL_ERROR)
        return Message(to_records(to_wire(answer)), reply_to=message)

    app.query(HELLO.partition(".")[2])(handle)
    app.train(ROUND.partition(".")[2])(handle)
    app.train(SECURE.partition(".")[2])(handle)
    return app
