"""Files that somebody, or a bad disk, has made other than kvembed did."""
