"""The ClientApp: the rim between Flower and an institution."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.institution import Institution
from common.errors import Refusal
from common.flower import MESSAGES, from_records, to_records
from common.messages import INTERNAL_ERROR, MALFORMED, Refused, Request
from common.wire import from_wire, to_wire

log = logging.getLogger("silotune.client")


def build_client_app(
    institution_of: Callable[[Context], AbstractContextManager[Institution]],
    heard: Callable[[str, Request], None] = lambda *_: None,
) -> ClientApp:
    """A ClientApp that lets the institution answer that `institution_of(context)` opens, one message each time.

    heard: told every request, with the id of its message, before it is answered.
    Flower sends the text of an exception to the coordinator as it is, so nothing may escape from here: whatever
    fails, even finding the institution, is answered with a reason code.
    """
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            request = from_wire(from_records(message.content))
            if not isinstance(request, Request):
                raise Refusal(MALFORMED, "a reply came where a request was expected")
            heard(message.metadata.message_id, request)
            with institution_of(context) as institution:
                answer = institution.answer(request)
        except Refusal as refusal:
            log.warning("refused: %s", refusal)
            answer = Refused.of(refusal)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # what a library in Rust raises when it panics is no Exception
            log.exception("no answer could be made")
            answer = Refused(INTERNAL_ERROR)
        return Message(to_records(to_wire(answer)), reply_to=message)

    for category, action in (kind.split(".") for kind in sorted(MESSAGES)):
        getattr(app, category)(action)(handle)
    return app
