"""What the preflight says about the place of the storage and, for --doctor, about damage to what others read there."""

from cluster.files import StorageError
from cluster.manifest import MARKER
from flows.config import RunConfig
from flows.graph import PUBLISHED_DATASET
from flows.retention import STUDENTS
from flows.run import MOST_NAMED, Run
from flows.student_files import damage_of
from operators.evaluate.release_history import ReleaseHistory
from operators.files.checksums import damaged_files
from operators.publish.own_folder import why_foreign
from operators.read.source_files import shown, would_read
from operators.stage import Finding

# Names below a storage that a run writes; of each, a file that a reader of folders and globs could take for data.
WRITTEN = (
    *("assets/raw_instructions/refresh=base/0.parquet", "ledger/reflect/0.parquet", "prompts/reflect/0.parquet"),
    *("scores/ifd/0/0.parquet", "students/0/config.json", "evaluations/0.parquet", "releases/000001.json"),
    *("refreshes/0.json", "published/parquet/0.parquet", "published/alpaca/0.jsonl", "published/messages/0.jsonl"),
    *("published/lineage.json", "reports/0.json", "released.json", "retracted.json"),
)


def place_findings(run: Run) -> list[Finding]:
    """Refuse a storage in which a run would delete what is not its own, or read as data what it wrote itself."""
    return [*_foreign(run), *_fed_to_itself(run.config)]


def damage_findings(run: Run) -> list[Finding]:
    """Compare the published data and the released student with their checksums; reads all of both."""
    try:
        found = [("published_dataset", _damage_of_published(run)), ("student", _damage_of_released(run))]
    except (StorageError, ValueError, OSError) as error:
        return [Finding("storage", str(error).removeprefix("storage: "), fatal=False)]
    return [Finding(key, text, fatal=False) for key, text in found if text]


def _damage_of_published(run: Run) -> str:
    manifest = run.store.manifest(PUBLISHED_DATASET)
    files = (manifest.value or {}).get("files") if manifest is not None else None
    wrong = damaged_files(run.path("published"), files or {})
    if not wrong:
        return ""
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    return (
        f"{run.path('published')}: {', '.join(wrong[:MOST_NAMED])}{more} are not what was published; delete "
        f"{run.store.folder(PUBLISHED_DATASET, None)}/{MARKER} and run again"
    )


def _damage_of_released(run: Run) -> str:
    current = ReleaseHistory(run.config.storage).current()
    return damage_of(run.path(STUDENTS, current.version)) if current else ""


def _foreign(run: Run) -> list[Finding]:
    told = why_foreign(run.path("published"))
    return [Finding("storage", told)] if told else []


def _fed_to_itself(config: RunConfig) -> list[Finding]:
    inputs = {"source.path": [config.source.path], "pack.mixture.general": [config.pack.mixture.general]}
    inputs["decontaminate.files"] = list(config.decontaminate.files)
    return [
        Finding(
            key,
            f"{shown(path)} includes files that a run writes to storage={config.storage}, so each run would read what "
            "the one before wrote; give a storage outside it, or one whose name begins with a dot",
        )
        for key, paths in inputs.items()
        for path in paths
        if path and _would_read(path, config.storage)
    ]


def _would_read(path: str, storage: str) -> bool:
    try:
        return would_read(path, storage, WRITTEN)
    except (ValueError, OSError):  # it cannot be reached; another finding reports it
        return False
