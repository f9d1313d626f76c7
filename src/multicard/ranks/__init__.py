"""What starts, watches and ends ranks; people call :mod:`multicard.launch`."""
