"""One file per section of the report: what it draws and what it says about it."""
