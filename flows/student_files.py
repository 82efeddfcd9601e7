"""The checksums of a finished student's files: a flipped bit in its weights is found before anybody is given them.

    students/<version>/checksums.json     name -> CRC-32 of each file that loading the student reads

A student that was trained before students had checksums has none, and is not checked.
"""

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.files import StorageError
from operators.files.atomic import put_file
from operators.files.checksums import checksums_of, damaged_files
from operators.files.copies import exists, files_below, read_text
from operators.files.seals import sealed, unsealed

CHECKPOINTS = "checkpoints"  # in a student's folder: what the training still needs
CHECKSUMS = "checksums.json"
READ = (".safetensors", ".json", ".jinja", ".model", ".txt")  # how files end that loading a student reads
MOST_NAMED = 3


class _Noted(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str]


def note_checksums(folder: str) -> None:
    """Write the checksums of a student that was just trained; a student that has them keeps those.

    Args:
        folder: of the student, a path or URI.
    """
    if not exists(f"{folder}/{CHECKSUMS}"):
        names = [name for name in files_below(folder) if name.endswith(READ) and not name.startswith(f"{CHECKPOINTS}/")]
        put_file(f"{folder}/{CHECKSUMS}", sealed(_Noted(files=checksums_of(folder, names))))


def damage_of(folder: str) -> str:
    """What is wrong with a student's files, with the cure; "" if nothing is, or if it has no checksums.

    Args:
        folder: of the student, a path or URI.

    Raises:
        OSError: a file cannot be read.
    """
    text = read_text(f"{folder}/{CHECKSUMS}")
    if text is None:
        return ""
    cure = "restore them from a backup, or release another student by `recycle-and-train rollback`"
    try:
        wrong = damaged_files(folder, _Noted.model_validate(unsealed(text)).files)
    except (ValueError, ValidationError):
        return f"{folder}/{CHECKSUMS} holds no checksums; restore it from a backup, or delete it to do without"
    if not wrong:
        return ""
    more = f" and {len(wrong) - MOST_NAMED} more" if len(wrong) > MOST_NAMED else ""
    named = ", ".join(wrong[:MOST_NAMED])
    return f"{folder}: {named}{more} are not what the training wrote; {cure}"


def require_undamaged(folder: str) -> None:
    """Check a student before it is evaluated or released.

    Raises:
        StorageError: `damage_of` found something.
    """
    if problem := damage_of(folder):
        raise StorageError(f"student: {problem}")
