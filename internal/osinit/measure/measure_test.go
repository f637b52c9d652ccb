package measure

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/slots"
)

// recorded is the log of a start of one machine with OVMF, shim, GRUB and kernel of Debian 12: "a" and "b" are starts of
// the slots as the good ones, "try-b" is b on trial for the first time. esp is the boot partition's identity there.
func recorded(t testing.TB, name string) []byte {
	t.Helper()
	f, err := os.Open("testdata/" + name + ".log.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var sealed = []int{4, 7, 8, 9}

func registers(t testing.TB, log []byte) (out [][]byte) {
	t.Helper()
	events, err := parse(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range sealed {
		out = append(out, register(events, n))
	}
	return out
}

// systemOf tells from a log what was started, and from which boot partition.
func systemOf(t testing.TB, log []byte, slot string) (s System, esp string) {
	t.Helper()
	events, err := parse(log)
	if err != nil {
		t.Fatal(err)
	}
	s.Slot = slot
	var config []string
	for _, e := range events {
		line, isCommand := strings.CutPrefix(e.text, command)
		switch name, _, _ := strings.Cut(line, " "); {
		case isCommand && name == "linux":
			_, esp, _ = strings.Cut(line, "cloudos.esp=")
			esp, _, _ = strings.Cut(esp, " ")
			config = append(config, "set esp=", "probe --set=esp --part-uuid $root", strings.NewReplacer("hd0,gpt2", "$root", esp, "$esp").Replace(line))
		case isCommand && name == "initrd":
			config = append(config, strings.ReplaceAll(line, "hd0,gpt2", "$root"))
		case e.pcr == programs:
			s.Image = e.digest // the last one
		case e.pcr == files && strings.HasSuffix(e.text, "/kernel"):
			s.Kernel = e.digest
		case e.pcr == files && strings.HasSuffix(e.text, "/initrd"):
			s.Initrd = e.digest
		case e.pcr == files && strings.HasSuffix(e.text, "/boot.cfg"):
			defer func() {
				if sha256.Sum256(s.Config) != e.digest {
					t.Errorf("the configuration is not as it was:\n%s", s.Config)
				}
			}()
		}
	}
	s.Config = []byte(strings.Join(config, "\n") + "\n")
	return s, esp
}

// TestBeforehand tells what a start will be measured as from the log of an earlier one, and compares with that start's.
func TestBeforehand(t *testing.T) {
	a, b, try := recorded(t, "a"), recorded(t, "b"), recorded(t, "try-b")
	sysA, esp := systemOf(t, a, "a")
	sysB, _ := systemOf(t, b, "b")
	for name, c := range map[string]struct {
		from  []byte
		now   System
		state slots.State
		next  System
		want  []byte
	}{
		"the same again":            {a, sysA, slots.State{Good: "a"}, sysA, a},
		"the other on trial":        {a, sysA, slots.State{Good: "a"}.Start("b"), sysB, try},
		"the other when it is kept": {a, sysA, slots.State{Good: "b"}, sysB, b},
		"from the trial":            {try, sysB, slots.State{Good: "b"}, sysB, b},
		"from the trial, back":      {try, sysB, slots.State{Good: "a"}, sysA, a},
		"back":                      {b, sysB, slots.State{Good: "a"}, sysA, a},
	} {
		s, err := Understand(c.from, c.now, esp, sealed, registers(t, c.from))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got, err := s.Registers(c.state, c.next, sealed)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i, want := range registers(t, c.want) {
			if !bytes.Equal(got[i], want) {
				t.Errorf("%s: register %d will be something else", name, sealed[i])
			}
		}
	}
	s, err := Understand(a, sysA, esp, sealed, registers(t, a))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]slots.State{}
	for _, state := range []slots.State{{Good: "a", Try: "b", Left: 3}, {Good: "a", Try: "b", Left: 2}, {Good: "a", Try: "b", Left: 1}, {Good: "b"}} {
		v, err := s.Registers(state, sysB, sealed)
		if err != nil {
			t.Fatal(err)
		}
		if other, ok := seen[string(v[2])]; ok {
			t.Errorf("%+v and %+v are measured as the same", state, other)
		}
		seen[string(v[2])] = state
	}
	if _, err := s.Registers(slots.State{Good: "a"}, sysB, sealed); err == nil {
		t.Error("a slot that is not started has registers")
	}
}

// TestNotUnderstood refuses starts that are not as expected.
func TestNotUnderstood(t *testing.T) {
	log := recorded(t, "a")
	values := registers(t, log)
	sys, esp := systemOf(t, log, "a")
	with := func(change func(*System)) System {
		s := sys
		change(&s)
		return s
	}
	for name, c := range map[string]struct {
		log    []byte
		sys    System
		esp    string
		values [][]byte
	}{
		"another kernel":        {log, with(func(s *System) { s.Kernel[0]++ }), esp, values},
		"another program":       {log, with(func(s *System) { s.Image[0]++ }), esp, values},
		"another initrd":        {log, with(func(s *System) { s.Initrd[0]++ }), esp, values},
		"another configuration": {log, with(func(s *System) { s.Config = append([]byte("set x=1\n"), s.Config...) }), esp, values},
		"another slot":          {log, with(func(s *System) { s.Slot = "b" }), esp, values},
		"another disk":          {log, sys, "cf919837-77b2-49a6-92c4-000000000000", values},
		"no disk":               {log, sys, "", values},
		"other registers":       {log, sys, esp, [][]byte{values[0], values[1], values[3], values[2]}},
		"cut off":               {log[:len(log)-1], sys, esp, values},
		"half":                  {log[:len(log)/2], sys, esp, values},
		"none":                  {nil, sys, esp, values},
		"a word of GRUB's":      {bytes.ReplaceAll(log, []byte("grub_cmd: set try="), []byte("grub_cmd: set trY=")), sys, esp, values},
	} {
		if _, err := Understand(c.log, c.sys, c.esp, sealed, c.values); err == nil {
			t.Errorf("%s: it was understood", name)
		}
	}
	s, err := Understand(log, sys, esp, sealed, values)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"linux ($root)/k a=$slot", "linux ($root)/k 'a'", "linux  ($root)/k", "linux ($root)/k ", "linux ($root)/k *", "if true; then", "insmod x", "", "set esp=x"} {
		if _, err := s.Registers(slots.State{Good: "b"}, System{Slot: "b", Config: []byte(line + "\n")}, sealed); err == nil {
			t.Errorf("%q was understood", line)
		}
	}
	if Known([]int{4, 7, 8, 9}) != nil || Known([]int{5, 7}) == nil {
		t.Error("other registers are known")
	}
}

func FuzzParse(f *testing.F) {
	f.Add(recorded(f, "a"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, log []byte) {
		events, err := parse(log)
		if err == nil && len(events) > maxEvents {
			t.Error("too many events")
		}
	})
}
