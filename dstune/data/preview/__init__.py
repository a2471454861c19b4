"""A prepared directory for the eye: what came from where, what was dropped and why, and conversations with what is trained.

`text` says what of the data may be shown and how, `survey` what there is to show, `terminal` and `page` show it. Whatever the data
holds, nothing of it reaches a terminal or a browser but characters that can be seen: no escape sequence, no markup.
"""

from dstune.data.preview.directory import opened
from dstune.data.preview.page import html_page, require_writable
from dstune.data.preview.survey import sample
from dstune.data.preview.terminal import preview, preview_json
from dstune.data.preview.text import segments, visible

__all__ = ["html_page", "opened", "preview", "preview_json", "require_writable", "sample", "segments", "visible"]
