"""A store on disk: shards and codecs, manifest, journal, reading values out of shards."""
