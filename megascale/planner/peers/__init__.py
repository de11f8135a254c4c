"""Other planners, as their authors would run them: ByteScale, FlexSP, static rings."""
