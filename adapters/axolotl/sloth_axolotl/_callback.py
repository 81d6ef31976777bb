"""The HF Trainer's callback with what Axolotl's users get more: notes on their config, a saved report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sloth_hf_trainer import SlothCallback

import sloth_plugins as sloth


class ReportingCallback(SlothCallback):
    """SlothCallback that adds `notes` to the report and saves it as `folder`/sloth_report.json."""

    def __init__(self, settings: sloth.Settings, notes: list[str], folder: Path) -> None:
        super().__init__(settings)
        self._notes, self._folder = notes, folder

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Complete the patches, print the report once, save it."""
        self.on_init_end(args, state, control, **kwargs)
        if self.acceleration is not None:
            report = self.acceleration.report
            report.notes.extend(note for note in self._notes if note not in report.notes)
        super().on_train_begin(args, state, control, **kwargs)
        if self.acceleration is not None and state.is_world_process_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / "sloth_report.json"
            path.write_text(self.acceleration.report.to_json() + "\n", encoding="utf-8")

    def _note_reference_model(self, trainer: Any) -> None:
        """Nothing to say: the plugin accelerates that model too."""
