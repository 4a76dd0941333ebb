"""What of these tests needs the CUDA extension, which an sdist of kvembed has not."""

from __future__ import annotations

import importlib.util

collect_ignore = ["test_choose.py"] if importlib.util.find_spec("native_build") is None else []
