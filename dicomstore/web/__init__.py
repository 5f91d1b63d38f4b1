"""DICOMweb (PS3.18), to read, over a store; optional: no other room imports it."""
