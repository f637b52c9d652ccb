package image

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if code, ours := UnpackMain(); ours {
		os.Exit(code)
	}
	if code, ours := LazyMain(); ours {
		os.Exit(code)
	}
	if os.Getenv(pullChild) != "" {
		pullUntilKilled()
	}
	os.Exit(m.Run())
}
