"""Publishing a run on the Hub, without ever holding the training up; `opefo-trl hub push OUT` for later."""

from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import NotPushedError, Publisher

__all__ = ["NotPushedError", "Publisher", "Target"]
