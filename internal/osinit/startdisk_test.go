package osinit

import (
	"encoding/binary"
	"strings"
	"testing"
	"unicode/utf16"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
)

func TestOneDisk(t *testing.T) {
	a, b := data.Disk{Name: "vda"}, data.Disk{Name: "vdb"}
	esp := gpt.GUID{1}
	for name, c := range map[string]struct {
		found []data.Disk
		esp   gpt.GUID
		want  string
		kind  fault.Kind
	}{
		"the one that was named":     {[]data.Disk{b}, esp, "", 0},
		"the only one":               {[]data.Disk{b}, gpt.GUID{}, "", 0},
		"the one that was named, no": {nil, esp, "none has the boot partition 00000001-", fault.NotFound},
		"none":                       {nil, gpt.GUID{}, "no disk with a partition cloudos-data", fault.NotFound},
		"copies":                     {[]data.Disk{a, b}, esp, "/dev/vda and /dev/vdb are copies of each other", fault.Conflict},
		"several, and nobody says":   {[]data.Disk{a, b}, gpt.GUID{}, "each have a partition cloudos-data", fault.Conflict},
	} {
		got, err := oneDisk(c.found, c.esp, "cloudos-data")
		switch {
		case c.want == "" && (err != nil || got != b):
			t.Errorf("%s: %v, %v", name, got, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || fault.Of(err) != c.kind || got != data.Disk{}):
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestWideText(t *testing.T) {
	b := []byte{6, 0, 0, 0}
	for _, u := range append(utf16.Encode([]rune("21686148-6449")), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	if got := wideText(b); got != "21686148-6449" {
		t.Errorf("it is %q", got)
	}
	for _, short := range [][]byte{nil, {6}, {6, 0, 0, 0}, {6, 0, 0, 0, 'x'}} {
		if got := wideText(short); got != "" {
			t.Errorf("%v is %q", short, got)
		}
	}
}
