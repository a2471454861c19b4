"""Cleaning: named, composable, counted steps over conversations, in the order that the run file gives. Off unless asked."""

from dstune.data.cleaning.cleaner import Cleaned, Cleaner
from dstune.data.cleaning.registry import STEPS

__all__ = ["STEPS", "Cleaned", "Cleaner"]
