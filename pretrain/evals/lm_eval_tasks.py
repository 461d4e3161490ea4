"""Tasks of lm-evaluation-harness: its own and those of a folder, by name; what is refused."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from pretrain.errors import UserError

NEAREST = 3
# Of the choice of examples, as the harness has it.
SEED = 1234


@dataclass(frozen=True)
class LoadedTasks:
    """What the harness evaluates.

    Attributes:
        harness: as `TaskManager.load` returns it: tasks, and groups of them, by name.
        without_examples: names of tasks whose files say `num_fewshot: 0`, which the harness never
            overrides: their questions are complete, or have examples in their text.
    """

    harness: Any
    without_examples: tuple[str, ...]

    @property
    def tasks(self) -> dict[str, Any]:
        return dict(self.harness["tasks"])

    def prepare(self, shots: int) -> None:
        """Give each question so many examples, the same at each call.

        Raises:
            UserError: a task has too few of them, or never has any.
        """
        for name, task in self.tasks.items():
            if shots and name in self.without_examples:
                raise UserError(
                    f"--num-fewshot {shots}: {name} takes no examples (num_fewshot: 0 in its "
                    "file); ask for it with --num-fewshot 0"
                )
            task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=SEED)
            _keep_question_out(task)
            _check_examples(name, task, shots)


def load_tasks(names: Sequence[str], folder: Path | None) -> LoadedTasks:
    """Tasks, groups and tags of these names, `*` standing for anything.

    Args:
        folder: with task files, `*.yaml`, which come before the harness's own of the same name;
            paths of data in them are relative to it.

    Raises:
        UserError: a file of the folder is damaged, there is no such task, or it cannot be loaded.
    """
    if folder is not None:
        _check_files(folder)
    disable_progress_bar()
    with _only_errors(), nullcontext() if folder is None else chdir(folder):
        manager = _manager(names, None if folder is None else Path.cwd())
        found = [match for name in names for match in _match(manager, name, folder)]
        loaded = _load(manager, list(dict.fromkeys(found)))
    for name, task in loaded["tasks"].items():
        _check_task(name, task)
    without = (name for name, task in loaded["tasks"].items() if _default_shots(task) == 0)
    return LoadedTasks(loaded, tuple(without))


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    if folder is not None:
        local = TaskManager(include_path=folder, include_defaults=False)
        if all(local.match_tasks([name]) for name in names):
            return local
    # The harness's own are some ten thousand files, which takes a while.
    return TaskManager(include_path=folder)


def _check_files(folder: Path) -> None:
    files = sorted(folder.rglob("*.yaml")) if folder.is_dir() else []
    if not files:
        raise UserError(
            f"--tasks-dir {folder}: no task file (*.yaml) there. `farspan data example-tasks --out "
            f"{folder}` writes some to begin with"
        )
    for file in files:
        try:
            load_yaml(file, resolve_func=False, recursive=True)
        except Exception as error:  # the harness leaves such files out without a word
            raise UserError(f"{file}: not a task file ({_first_line(error)})") from error


def _match(manager: Any, name: str, folder: Path | None) -> list[str]:
    found: list[str] = sorted(manager.match_tasks([name]))
    if not found:
        nearest = get_close_matches(name, manager.all_tasks, n=NEAREST, cutoff=0.5)
        hint = f"did you mean {', '.join(nearest)}?" if nearest else "`lm-eval ls tasks` lists them"
        where = "" if folder is None else f", nor has --tasks-dir {folder}"
        raise UserError(f"--tasks {name}: the harness has no such task{where}; {hint}")
    return found


def _load(manager: Any, names: list[str]) -> Any:
    try:
        return manager.load(names)
    except ConnectionError as error:
        raise UserError(
            f"--tasks {','.join(names)}: the data is not on this machine, and the network is not "
            f"there or switched off ({_first_line(error)}). Run it once where there is a network "
            "and bring its cache ($HF_HOME) along, or give task files with data of your own by "
            "--tasks-dir"
        ) from error
    except Exception as error:  # whatever a task's file or its own code raises
        raise UserError(
            f"--tasks {','.join(names)}: cannot be loaded: {type(error).__name__}: "
            f"{_first_line(error)}"
        ) from error


def _check_task(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"{name} runs code that the model writes, which farspan does not: export the model, "
            "and run lm-eval on it with --confirm_run_unsafe_code in a sandbox"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"{name} asks about images or sound; the model reads text alone")


def _default_shots(task: Any) -> int | None:
    shots: int | None = task.get_config("num_fewshot")
    return shots


def _keep_question_out(task: Any) -> None:
    """Let no question be an example of itself.

    Where examples are taken from what is asked, the harness leaves the question out only if the
    task's file names the split of the examples and calls it the test split.
    """
    examples, config = getattr(task, "fewshot_cfg", None), task.config
    if examples is None or (examples.split is None and examples.samples is not None):
        return
    source = examples.split or config.training_split or config.validation_split or config.test_split
    if source == (config.test_split or config.validation_split):
        # What the harness compares to find out.
        examples.split = config.test_split


def _check_examples(name: str, task: Any, shots: int) -> None:
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    itself = task.fewshot_cfg.split == task.config.test_split
    allowed = len(sampler.df) - itself
    if shots > allowed:
        raise UserError(
            f"--num-fewshot {shots}: {name} has {len(sampler.df)} examples"
            f"{', of which a question is not its own' if itself else ''}; allowed: up to {allowed}"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _only_errors() -> Iterator[None]:
    """The harness warns of what is checked here."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
