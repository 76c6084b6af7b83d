"""The command line. Parses, calls one public function, prints; nothing imports it."""
