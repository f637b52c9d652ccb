package shim

import (
	"bytes"
	"encoding/json"
	"errors"
	"syscall"
	"testing"
)

func TestDecode(t *testing.T) {
	good := append(header(ctlExited, 7, 20), bytes.Repeat([]byte{1}, 20)...)
	m, err := decode(good)
	if err != nil || m.typ != ctlExited || m.cookie != 7 || len(m.body) != 20 {
		t.Fatalf("%+v %v", m, err)
	}
	later := bytes.Clone(good)
	later[0]++
	for name, b := range map[string][]byte{"empty": nil, "short": good[:11], "cut": good[:20], "long": append(bytes.Clone(good), 0), "later version": later} {
		if _, err := decode(b); err == nil {
			t.Errorf("%s was decoded", name)
		}
	}
	fail := append([]byte{3, 0, 0, 0, 2, 0, 0, 0, 11}, "mount /data"...)
	var se *StageError
	if err := decodeFailure(fail); !errors.As(err, &se) || se.Op != 3 || !errors.Is(err, syscall.ENOENT) || err.Error() != "cannot mount /data: no such file or directory" {
		t.Errorf("%v", err)
	}
	if err := decodeFailure(fail[:12]); errors.As(err, &se) && se.Name == "mou" {
		t.Error("a cut failure was decoded")
	}
	fail[4] = 0 // success is no failure
	if err := decodeFailure(fail); !errors.Is(err, syscall.EPROTO) {
		t.Errorf("%v", err)
	}
}

func TestRecord(t *testing.T) {
	e, at, err := parseRecord([]byte(`{"version":1,"pid":12,"status":256,"started":5,"exited":6,"dropped":7}`))
	if err != nil || e.Status.ExitStatus() != 1 || e.At != 6 || e.Dropped != 7 || at.UnixNano() != 5 {
		t.Errorf("%+v %v %v", e, at, err)
	}
	for _, s := range []string{"", "{}", `{"version":2}`, `{"version":1,"status":-1}`, "garbage"} {
		if _, _, err := parseRecord([]byte(s)); err == nil {
			t.Errorf("%q was read", s)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add(header(ctlExited, 1, 0))
	f.Add(append(header(ctlFailed, 1, 10), 0, 0, 0, 0, 2, 0, 0, 0, 1, 'x'))
	f.Add(append(header(ctlStateIs, 1, 32), make([]byte, 32)...))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := decode(b)
		if err != nil {
			return
		}
		if len(m.body)+hdrLen != len(b) {
			t.Fatal("length")
		}
		_, _ = decodeStarted(m.body)
		_, _ = decodeExit(m.body)
		_, _ = decodeState(m.body)
		if decodeFailure(m.body) == nil {
			t.Fatal("a failure without error")
		}
	})
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"version":1,"pid":12,"status":256,"started":5,"exited":6,"dropped":7}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, _, err := parseRecord(b); err == nil && !json.Valid(b) {
			t.Fatal("invalid JSON was read")
		}
	})
}
