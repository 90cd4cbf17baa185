"""Publishing a run on the Hub, without ever holding the training up.

trainer.push_to_hub()                      # at the end: wait until everything is there
python -m opefo_trl.hub push OUT           # later, from a shell: push what is missing
"""

from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import NotPushedError, Publisher

__all__ = ["NotPushedError", "Publisher", "Target"]
