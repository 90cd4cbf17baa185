"""What a run leaves on the Hub, without ever holding it up.

OPEFOConfig(..., push_to_hub=True, hub_model_id="user/model", hub_strategy="checkpoint")
trainer.push_to_hub()                      # at the end: waits, and says what is there

python -m opefo_trl.hub push out           # later, from a shell: what is missing
"""

from opefo_trl.hub.outbox import Outcome, Target
from opefo_trl.hub.publisher import NotPushedError, Publisher
from opefo_trl.hub.upload import attempt, push

__all__ = ["NotPushedError", "Outcome", "Publisher", "Target", "attempt", "push"]
