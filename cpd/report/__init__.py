"""What came of a run: records, charts, pages, the folder of a result."""
