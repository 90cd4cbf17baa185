"""The publishing hooks of `OPEFOTrainer`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from transformers.trainer_utils import HubStrategy, SaveStrategy
from trl import GRPOTrainer

from opefo_trl.files import write_whole
from opefo_trl.hub.model_card import RunFacts, write_card
from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import Publisher, in_background
from opefo_trl.trl_compat import get_config_model_id

logger = get_logger(__name__)


class HubMixin(GRPOTrainer):
    publisher: Publisher | None = None

    run_facts = RunFacts()

    @property
    def base_model(self) -> str:
        """The model that the run began with: a name on the Hub, a folder, or nothing that is known."""
        return get_config_model_id(self.model.config)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        if self.is_world_process_zero():
            if self.publisher is not None:
                self.hub_model_id = self.publisher.repo
            try:
                write_card(self, model_name, dataset_name, tags)
            except Exception as error:  # of the file that is there, say: it may not cost the run
                logger.warning(f"The model card could not be written: {type(error).__name__}: {error}")

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """PEFT would write a card of its own over the one that is there, with the path of a local base model in it."""
        card = Path(output_dir or self.args.output_dir) / "README.md"
        before = card.read_bytes() if card.is_file() else None
        super()._save(output_dir, state_dict)
        if before is not None:
            write_whole(card, lambda part: part.write_bytes(before))
        else:
            card.unlink(missing_ok=True)

    def init_hf_repo(self, token: str | None = None) -> None:
        if self.publisher is not None or not self.is_world_process_zero():
            return
        args = self.args
        self.hub_model_id = args.hub_model_id or Path(args.output_dir).absolute().name
        strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
        target = Target(self.hub_model_id, args.hub_private_repo, args.hub_revision, strategy, args.hub_always_push)
        self.publisher = Publisher(Path(args.output_dir), target, token or args.hub_token)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # each rank writes a file or more of the checkpoint
        if self.publisher is None:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        steps = self.args.save_strategy != SaveStrategy.EPOCH
        when = f"step {self.state.global_step}" if steps else f"epoch {int(self.state.epoch or 0)}"
        self.publisher.save(Path(checkpoint_folder), f"Training in progress, {when}")

    def _finish_current_push(self) -> None:
        """At the end of `train`: other ranks would wait here, and time out. `push_to_hub` waits, or the exit does."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Push the model, its card and its curves, and whatever is not on the Hub yet.

        Takes the arguments of [`~transformers.Trainer.push_to_hub`]. Returns a `CommitInfo` when all of it is there,
        or with `blocking=False` a `Future` of it; what is not there raises [`~opefo_trl.hub.NotPushedError`], is kept,
        and can be pushed later: `python -m opefo_trl.hub push OUT`.
        """
        self.init_hf_repo(token)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        assert self.publisher is not None
        self.publisher.token = token or self.publisher.token
        self.create_model_card(**kwargs)
        self.publisher.save(None, commit_message or "End of training", revision)
        if self.is_in_train:  # a callback's: the training does not wait
            return None
        if blocking:
            return self.publisher.finish()
        return in_background(partial(self.publisher.finish, told=False))
