"""Training a student against a teacher."""
