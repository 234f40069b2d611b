"""Files: what is written is whole or not there, and what is read is what was written, or refused."""
