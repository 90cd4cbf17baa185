"""The trainer's side of publishing: saves go into the outbox, and the training never waits for the Hub."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from opefo_trl.cli.run_folder import checkpoints
from opefo_trl.files import CARD_FILE, write_whole
from opefo_trl.hub.model_card import RunFacts, RunSummary, write_card
from opefo_trl.hub.outbox import Target
from opefo_trl.hub.publisher import Publisher, logger
from opefo_trl.trl_compat import get_config_model_id


class HubMixin:
    """
    Overrides how transformers' `Trainer` and TRL's trainers publish: `init_hf_repo`, `_push_from_checkpoint`,
    `push_to_hub`, `create_model_card` and `_save`. Reads TRL's `_tag_names` and `_paper`.
    """

    publisher: Publisher | None = None  # on the first rank, with `push_to_hub`
    run_facts = RunFacts()  # what the model card says beyond what a trainer knows

    def init_hf_repo(self: Any, token: str | None = None) -> None:
        if self.publisher is not None or not self.is_world_process_zero():
            return
        args, out = self.args, Path(self.args.output_dir)
        self.hub_model_id = args.hub_model_id or out.absolute().name
        options = args.hub_private_repo, args.hub_revision, args.hub_strategy.value, args.hub_always_push
        self.publisher = Publisher(out, Target(self.hub_model_id, *options), token or args.hub_token)
        self.publisher.outbox.sweep()

    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if self.args.hub_strategy == "end":
            return
        self.accelerator.wait_for_everyone()  # each rank writes files of the checkpoint
        if self.publisher is not None:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            by_epoch, epoch = self.args.save_strategy == "epoch", int(self.state.epoch or 0)
            when = f"epoch {epoch}" if by_epoch else f"step {self.state.global_step}"
            self.publisher.stage([Path(checkpoint_folder)], f"Training in progress, {when}")

    def push_to_hub(
        self: Any,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Push what is not on the Hub yet. Returns a `CommitInfo`, or with `blocking=False` a `Future` of it; what is not
        there raises `NotPushedError` and is kept: `opefo-trl hub push OUT` pushes it later.
        """
        self.init_hf_repo(token)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.publisher.token = token or self.publisher.token
        self.create_model_card(**kwargs)
        self.publisher.stage(checkpoints(self.args.output_dir), commit_message or "End of training", revision)
        if self.is_in_train:  # called by a callback, which does not wait
            return None
        return self.publisher.finish() if blocking else ThreadPoolExecutor(1).submit(self.publisher.finish)

    def create_model_card(
        self: Any, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        if not self.is_world_process_zero():
            return
        self.hub_model_id = self.publisher.repo if self.publisher else self.hub_model_id
        try:
            summary = RunSummary(
                args=self.args,
                facts=replace(self.run_facts, data=dataset_name, on_hub=True) if dataset_name else self.run_facts,
                name=(model_name or self.hub_model_id or Path(self.args.output_dir).absolute().name).split("/")[-1],
                repo=self.hub_model_id if "/" in str(self.hub_model_id) else None,
                base_model=get_config_model_id(self.model.config),
                adapter=hasattr(self.accelerator.unwrap_model(self.model), "peft_config"),
                steps=(self.state.global_step, self.state.max_steps),
                rewards=self.reward_func_names,
                curves=None if self.curves is None else self.curves.frame,
                paper=self._paper,
                tags=[*self._tag_names, *([tags] if isinstance(tags, str) else tags or ())],
                dataset=self.train_dataset,
            )
            write_card(summary)
        except Exception as error:  # the card that is there cannot be read, say: it may not cost the run
            text = f"The model card could not be written: {type(error).__name__}: {error}"
            logger.warning(text, exc_info=not isinstance(error, OSError))

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Keep the card, over which PEFT writes one of its own, with the path of a local base model."""
        card = Path(output_dir or self.args.output_dir) / CARD_FILE
        content = card.read_bytes() if card.is_file() else None
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if content is None:
            card.unlink(missing_ok=True)
        else:
            write_whole(card, lambda part: part.write_bytes(content))
