"""Keyed hashes in the place of names that identify a person. The key never lies in the output."""

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from med3dvlm.data.sources.base import SourceError, SourceOptions, as_bytes


@dataclass(frozen=True)
class Pseudonyms:
    """Gives each name a hash that only the holder of the key can make."""

    key: bytes

    def __call__(self, kind: str, name: str | bytes, length: int = 12) -> str:
        """`length` hexadecimal digits: the same for the same key, kind and name."""
        name = name if isinstance(name, bytes) else as_bytes(name)
        return hmac.new(self.key, kind.encode() + b"|" + name, hashlib.sha256).hexdigest()[:length]

    @classmethod
    def from_file(cls, path: Path, make: bool = True) -> "Pseudonyms":
        """Read the key; where there is no file yet, make one that only this user can read, or, unless `make`, none.

        Raises SourceError where the file holds no key.
        """
        if not path.exists():
            if not make:
                return cls(secrets.token_bytes(32))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            with open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
            try:
                os.link(temporary, path)  # fails where another shard was first: then its key counts
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        try:
            key = bytes.fromhex(path.read_text().strip())
        except (OSError, ValueError) as error:
            raise SourceError(f"{path}: is no key file ({error}); name another one with --key_file") from error
        if len(key) < 16:
            raise SourceError(f"{path}: the key is too short; name another file with --key_file")
        return cls(key)


def pseudonyms(options: SourceOptions) -> Pseudonyms:
    """Those of the user's key; a dry run makes no key file, and so shows other names."""
    return Pseudonyms.from_file(options.key_file, make=not options.dry_run)
