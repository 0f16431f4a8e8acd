"""The DeepSpeed engine and its optimizer; swap files on NVMe."""
