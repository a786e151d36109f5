"""Policy and reward on spaces small enough to list, so that every law is known exactly and every claim can be held
against it."""
