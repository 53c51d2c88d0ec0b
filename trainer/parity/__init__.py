"""Does a layout compute what one process computes? A configuration, scaled down, is run on both and compared."""
