"""The forms of an export by name."""

OWN, SENTENCES = "dist_vse", "sentence-transformers"
FORMS = (OWN, SENTENCES, "transformers", "openclip")
