"""fMRI of the Kamitani lab: Generic Object Decoding and Deeprecon."""
