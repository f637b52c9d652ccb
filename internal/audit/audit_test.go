package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
)

func open(t *testing.T, c Config) *Log {
	t.Helper()
	l, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func call(t *testing.T, l *Log, method, object string, err error) {
	t.Helper()
	_ = l.Do(caller.With(context.Background(), &caller.Caller{Edge: "docker", Local: true, UID: 7, PID: uint32(os.Getpid())}),
		Call{Method: method, Object: object}, func(error) int { return 500 }, func(context.Context) error { return err })
}

func lines(t *testing.T, l *Log) []api.AuditRecord {
	t.Helper()
	var out []api.AuditRecord
	if err := l.Read(context.Background(), time.Time{}, false, func(b []byte) error {
		r, err := api.OpenAudit(b)
		if err != nil {
			t.Errorf("%q: %v", b, err)
		}
		out = append(out, r)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func verify(t *testing.T, dir string) []string {
	t.Helper()
	l := open(t, Config{Dir: dir})
	defer l.Close()
	r, err := l.Verify(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return r.Problems
}

func TestRecords(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	call(t, l, "POST /containers/create", "", nil)
	call(t, l, "POST /x", strings.Repeat("é", 5000), errors.New("no"))
	l.tasks.Wait()
	if e, _ := l.Begin(context.Background(), Call{Method: "GET /info", Read: true}); e != nil {
		t.Error("a read was recorded")
	}
	if rep, err := l.Verify(context.Background()); err != nil || len(rep.Problems) > 0 || rep.Last < 5 {
		t.Errorf("%+v %v", rep, err)
	}
	var events []string
	for _, r := range lines(t, l) {
		events = append(events, r.Event)
		if r.Event == "begin" && (r.Who == nil || *r.Who.UID != 7 || r.Who.Program == "") {
			t.Errorf("who: %+v", r.Who)
		}
		if len(r.Object) > maxText+4 {
			t.Errorf("an object of %d bytes", len(r.Object))
		}
		if r.Event == "end" && r.Call == 0 {
			t.Error("an end without its beginning")
		}
	}
	slices.Sort(events) // an end may come behind the next beginning
	if !slices.Equal(events, []string{"begin", "begin", "end", "end", "start"}) {
		t.Error(events)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, dir); len(p) > 0 {
		t.Error(p)
	}
	// A nil log takes everything.
	var none *Log
	call(t, none, "POST /x", "", nil)
	if none.Close() != nil || none.Enabled() {
		t.Error("a nil log")
	}
}

// TestTampering changes the log in every way; each must show.
func TestTampering(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	for i := range 10 {
		call(t, l, "POST /x", fmt.Sprint(i), nil)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, _ := filepath.Glob(dir + "/" + prefix + "*")
	good, err := os.ReadFile(names[0])
	if err != nil || len(names) != 1 {
		t.Fatal(err, names)
	}
	head, _ := os.ReadFile(dir + "/" + headFile)
	all := bytes.SplitAfter(good, []byte("\n"))
	all = all[:len(all)-1]
	for what, change := range map[string]func() []byte{
		"a word":            func() []byte { return bytes.Replace(good, []byte(`"object":"3"`), []byte(`"object":"4"`), 1) },
		"a record removed":  func() []byte { return bytes.Join(slices.Concat(all[:5], all[6:]), nil) },
		"two swapped":       func() []byte { return bytes.Join(slices.Concat(all[:5], all[6:7], all[5:6], all[7:]), nil) },
		"one twice":         func() []byte { return bytes.Join(slices.Concat(all[:5], all[4:]), nil) },
		"the first removed": func() []byte { return bytes.Join(all[1:], nil) },
		"the last removed":  func() []byte { return bytes.Join(all[:len(all)-1], nil) },
		"the last changed": func() []byte {
			return append(bytes.Join(all[:len(all)-1], nil), bytes.Replace(all[len(all)-1], []byte("stop"), []byte("stap"), 1)...)
		},
		"emptied":            func() []byte { return nil },
		"a line put in":      func() []byte { return bytes.Join(slices.Concat(all[:5], [][]byte{[]byte("{}\n")}, all[5:]), nil) },
		"garbage at the end": func() []byte { return append(bytes.Clone(good), "hello\n"...) },
		"rehashed alone": func() []byte {
			r, _ := api.OpenAudit(all[4])
			r.Object = "other"
			b, _ := r.Seal()
			return bytes.Join(slices.Concat(all[:4], [][]byte{b}, all[5:]), nil)
		},
		"rewritten as a whole": func() []byte {
			var out []byte
			prev := api.AuditGenesis
			for _, a := range all {
				r, _ := api.OpenAudit(a)
				r.Prev = prev
				if r.Object == "3" {
					r.Object = "other"
				}
				b, _ := r.Seal()
				prev = r.Hash
				out = append(out, b...)
			}
			return out
		},
	} {
		if err := errors.Join(os.WriteFile(names[0], change(), 0o600), os.WriteFile(dir+"/"+headFile, head, 0o600)); err != nil {
			t.Fatal(err)
		}
		// Verified as it is, by whoever reads the files and the head noted before.
		v := api.AuditVerifier{}
		var h api.AuditHead
		if _, err := fmt.Sscanf(string(head), "%d %64s", &h.Seq, &h.Hash); err != nil {
			t.Fatal(err)
		}
		v.Expect(h)
		for line := range bytes.Lines(change()) {
			v.Line(line)
		}
		if rep := v.End(); len(rep.Problems) == 0 {
			t.Errorf("%s: nothing shows: %+v", what, rep)
		}
		// Nor is it forgotten when an engine starts on that and writes on.
		stillShows(t, what, names[0], change(), head)
	}
	stillShows(t, "the note removed", names[0], good, nil)
	stillShows(t, "cut, and the note removed", names[0], bytes.Join(all[:len(all)-1], nil), nil)
	stillShows(t, "everything but the note removed", "", nil, head)
	// An engine that starts on a changed log goes on, and still says so.
	if err := errors.Join(os.WriteFile(names[0], append(bytes.Clone(good), "hello\n"...), 0o600), os.WriteFile(dir+"/"+headFile, head, 0o600)); err != nil {
		t.Fatal(err)
	}
	l = open(t, Config{Dir: dir})
	call(t, l, "POST /x", "later", nil)
	rep, err := l.Verify(context.Background())
	if err != nil || len(rep.Problems) == 0 {
		t.Errorf("%+v %v", rep, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// stillShows starts twice on a log whose last file is called name, and wants a problem to be told.
func stillShows(t *testing.T, what, name string, log, head []byte) {
	t.Helper()
	dir := t.TempDir()
	if name != "" {
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), log, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if head != nil {
		if err := os.WriteFile(filepath.Join(dir, headFile), head, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if p := verify(t, dir); len(p) == 0 {
			t.Errorf("%s: nothing shows after a start", what)
		}
	}
}

// TestCrash cuts the file at every byte of its last two records: what is whole
// stays, and the chain goes on.
func TestCrash(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir})
	for i := range 3 {
		call(t, l, "POST /x", fmt.Sprint(i), nil)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, _ := filepath.Glob(dir + "/" + prefix + "*")
	good, _ := os.ReadFile(names[0])
	lastTwo := bytes.LastIndexByte(good[:bytes.LastIndexByte(good[:len(good)-1], '\n')], '\n')
	for n := lastTwo; n < len(good); n += 7 {
		sub := t.TempDir()
		if err := os.WriteFile(filepath.Join(sub, filepath.Base(names[0])), good[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		// The head lags behind after a power cut, it is not ahead.
		r, _ := api.OpenAudit(bytes.SplitAfter(good, []byte("\n"))[0])
		if err := os.WriteFile(filepath.Join(sub, headFile), fmt.Appendf(nil, "%020d %s\n", r.Seq, r.Hash), 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, Config{Dir: sub})
		call(t, l, "POST /x", "after", nil)
		rep, err := l.Verify(context.Background())
		if err != nil || len(rep.Problems) > 0 {
			t.Fatalf("cut at %d: %+v %v", n, rep, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, MaxSize: 2 << 10, MaxFiles: 3})
	for i := range 60 {
		call(t, l, "POST /x", fmt.Sprint(i), nil)
	}
	rep, err := l.Verify(context.Background())
	if err != nil || len(rep.Problems) > 0 || rep.First == 1 {
		t.Errorf("%+v %v", rep, err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	names, _ := filepath.Glob(dir + "/" + prefix + "*")
	if len(names) > 4 || len(names) < 2 {
		t.Error(names)
	}
	if p := verify(t, dir); len(p) > 0 {
		t.Error(p)
	}
	// A file taken away is no rotation.
	if err := os.Remove(names[0]); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, dir); len(p) == 0 {
		t.Error("a missing file does not show")
	}
}

func TestFollowAndConcurrency(t *testing.T) {
	l := open(t, Config{Dir: t.TempDir(), MaxSize: 4 << 10})
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	seen := map[uint64]bool{}
	done := make(chan error, 1)
	go func() {
		done <- l.Read(ctx, time.Time{}, true, func(b []byte) error {
			r, err := api.OpenAudit(b)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || seen[r.Seq] {
				return fmt.Errorf("%q: %w", b, err)
			}
			seen[r.Seq] = true
			return nil
		})
	}()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 20 {
				call(t, l, "POST /x", fmt.Sprint(i), nil)
			}
		})
	}
	wg.Wait()
	rep, err := l.Verify(context.Background())
	if err != nil || len(rep.Problems) > 0 {
		t.Errorf("%+v %v", rep, err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		mu.Lock()
		n := len(seen)
		mu.Unlock()
		if n >= 321 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d records were followed", n)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRequired: with a log that cannot be written, nothing is done unrecorded.
func TestRequired(t *testing.T) {
	for _, required := range []bool{true, false} {
		l := open(t, Config{Dir: t.TempDir(), Required: required})
		call(t, l, "POST /x", "a", nil)
		f := l.f
		broken, err := os.Open(f.Name()) // read-only: every write fails
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.Verify(context.Background()); err != nil { // the writer is idle
			t.Fatal(err)
		}
		l.f = broken
		done := false
		err = l.Do(context.Background(), Call{Method: "POST /x"}, func(error) int { return 500 }, func(context.Context) error { done = true; return nil })
		if done == required || (err != nil) != required {
			t.Errorf("required %v: done %v, %v", required, done, err)
		}
		time.Sleep(20 * time.Millisecond)
		_, _ = l.Verify(context.Background())
		l.f = f
		broken.Close()
		call(t, l, "POST /x", "b", nil)
		call(t, l, "POST /x", "c", nil)
		if _, err := l.Verify(context.Background()); err != nil {
			t.Fatal(err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		lost := false
		for _, r := range lines(t, l) {
			lost = lost || r.Event == "lost"
		}
		if !lost {
			t.Errorf("required %v: nothing says that records were lost", required)
		}
	}
}

func FuzzOpenAudit(f *testing.F) {
	r := api.AuditRecord{Seq: 1, Event: "begin", Prev: api.AuditGenesis}
	b, _ := r.Seal()
	f.Add(b)
	f.Fuzz(func(t *testing.T, line []byte) {
		r, err := api.OpenAudit(line)
		var v api.AuditVerifier
		v.Line(line)
		v.End()
		if err == nil && len(r.Hash) != 64 {
			t.Errorf("%q", line)
		}
	})
}
