"""Measurements on disk: one replay buffer an artifact, one row a measured step."""

from tdhook_train.buffer.artifact import Artifact
from tdhook_train.buffer.buffer import ArtifactBuffer

__all__ = ["Artifact", "ArtifactBuffer"]
