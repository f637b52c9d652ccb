package container

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func TestRecordRoundTrip(t *testing.T) {
	r := &Record{Version: RecordVersion, ID: strings.Repeat("ab", 32), Name: "x", Created: time.Now().UTC().Round(0),
		Config: &container.Config{Image: "i", Labels: map[string]string{"a": "b"}}, HostConfig: &container.HostConfig{AutoRemove: true},
		State: State{Status: container.StateExited, ExitCode: 3}, Ephemeral: true}
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Decode(b)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, r) {
		t.Errorf("got %+v\nwant %+v", got, r)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"Version":1}`))
	f.Add([]byte(`{"Version":2,"ID":"zz"}`))
	f.Add([]byte(`[`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := Decode(b); err == nil && (r.Config == nil || r.HostConfig == nil || !ValidID(r.ID)) {
			t.Errorf("accepted %q", b)
		}
	})
}
