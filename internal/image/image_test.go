package image

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if code, ours := UnpackMain(); ours {
		os.Exit(code)
	}
	os.Exit(m.Run())
}
