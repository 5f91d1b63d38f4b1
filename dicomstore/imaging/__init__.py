"""Images: what their headers say, how they look; knows DICOM and slides, not Redis."""

from dicomstore.imaging import codecs

codecs.register()  # so that pydicom can decode what is read from a store, too
