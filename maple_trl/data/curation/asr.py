"""Speech to text, for clips without a subtitle."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from maple_trl.data.curation.config import Asr
from maple_trl.data.curation.errors import CurationError


class Transcriber:
    """
    A model of faster-whisper, loaded when it is first needed.

    Args:
        options (`Asr`): its name and how it runs.
    """

    def __init__(self, options: Asr):
        self.options = options
        self._model: Any = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """What stands in the provenance of a text."""
        return f"faster-whisper:{Path(self.options.model).name}"

    def transcribe(self, path: Path) -> list[dict[str, Any]]:
        """
        Write down what is said in a WAV file: segments as Whisper writes them, none where nothing is said.

        Raises:
            CurationError: when the model cannot be loaded.
        """
        with self._lock:
            if self._model is None:
                self._model = self._load()
            segments, _ = self._model.transcribe(
                str(path), language=self.options.language, vad_filter=True, temperature=0.0
            )
            texts = [(round(item.start, 2), round(item.end, 2), " ".join(item.text.split())) for item in segments]
        return [{"start": start, "end": end, "text": text} for start, end, text in texts if text]

    def _load(self) -> Any:
        from faster_whisper import WhisperModel

        options = self.options
        try:
            return WhisperModel(options.model, device=options.device, compute_type=options.compute_type)
        except Exception as error:  # of its own, of the hub, of CTranslate2
            raise CurationError(
                f"split.asr.model: faster-whisper cannot load {options.model!r} ({type(error).__name__}: {error}); name one "
                "of its models, or a folder with one"
            ) from error
