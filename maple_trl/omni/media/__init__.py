"""Media files to arrays: decoding, clips, sound, subtitles."""

from maple_trl.omni.errors import MediaError
from maple_trl.omni.media.loader import MediaLoader
from maple_trl.omni.media.sampling import MediaLimits


__all__ = ["MediaError", "MediaLimits", "MediaLoader"]
