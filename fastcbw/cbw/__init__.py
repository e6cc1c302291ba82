"""The copy-before-write engine: state, intercept, store, reader, copier, and the Engine that is the door to them."""
