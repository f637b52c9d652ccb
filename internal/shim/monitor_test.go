package shim

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

type recorder struct {
	exited chan Exit
	gone   chan struct{}
}

func (r *recorder) Exited(e Exit)           { r.exited <- e }
func (r *recorder) ExecExited(uint32, Exit) {}
func (r *recorder) Reborn(_, fd int)        { closeAll([]int{fd}) }
func (r *recorder) Notify(fd int)           { closeAll([]int{fd}) }
func (r *recorder) Gone()                   { close(r.gone) }

func newRecorder() *recorder {
	return &recorder{exited: make(chan Exit, 1), gone: make(chan struct{})}
}

func executable(t testing.TB) *Executable {
	e, err := NewExecutable()
	if err != nil {
		t.Skipf("SKIP: %v", err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func ended(t testing.TB, r *recorder) {
	t.Helper()
	select {
	case <-r.gone:
	case <-time.After(10 * time.Second):
		t.Fatal("the monitor does not end")
	}
}

// TestSealed: nobody can write to the program any more.
func TestSealed(t *testing.T) {
	e := executable(t)
	if _, err := e.File().WriteAt([]byte("x"), 0); err == nil {
		t.Error("the program was written to")
	}
	if err := e.File().Truncate(0); err == nil {
		t.Error("the program was cut")
	}
}

// TestCommand: a command of ours makes a "container" and the monitor adopts it.
func TestCommand(t *testing.T) {
	if _, err := os.Stat("/bin/sh"); err != nil {
		t.Skip("SKIP: there is no shell")
	}
	e, r := executable(t), newRecorder()
	dir := t.TempDir()
	m, err := e.Spawn(dir, r)
	if err != nil {
		t.Fatal(err)
	}
	null := int(e.null.Fd())
	p, err := m.Start(StartRequest{
		Plan: Plan{Slots: []int{null, null, null}}, Stdin: -1, Stdout: -1, Stderr: -1, LogPipe: -1,
		Command: []string{"/bin/sh", "-c", "(while ! test -e go; do sleep 0.01; done; exit 9) & echo $! > pid; test \"$FOO\" = bar"}, Env: []string{"PATH=/bin:/usr/bin", "FOO=bar"},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := p.Done(ctx); err != nil {
		t.Fatal(err)
	}
	// Another engine finds it there.
	r2 := newRecorder()
	m2, err := Dial(dir, r2)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := m2.State(ctx); err != nil || st.Phase != Held || st.PID == 0 {
		t.Fatalf("%+v %v", st, err)
	}
	if p, err = m2.Release(); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Started(ctx); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, x := range []*recorder{r, r2} {
		if e := <-x.exited; e.Status.ExitStatus() != 9 {
			t.Errorf("%+v", e)
		}
		ended(t, x)
	}
	rec, _, err := ReadRecord(dir)
	if err != nil || rec.Status.ExitStatus() != 9 {
		t.Errorf("%+v %v", rec, err)
	}
	if _, err := m.State(ctx); err == nil {
		t.Error("a monitor that is gone answered")
	}
	if _, err := Dial(dir, r); err == nil {
		t.Error("a monitor that is gone was reached")
	}
}

func TestCommandFails(t *testing.T) {
	e := executable(t)
	for _, args := range [][]string{{"/bin/false"}, {"/nonexistent"}, {"relative"}, {"/bin/true"}} {
		r := newRecorder()
		m, err := e.Spawn(t.TempDir(), r)
		if err != nil {
			t.Fatal(err)
		}
		null := int(e.null.Fd())
		p, err := m.Start(StartRequest{Plan: Plan{Slots: []int{null, null, null}}, Stdin: -1, Stdout: -1, Stderr: -1, LogPipe: -1, Command: args})
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Done(context.Background()); err == nil {
			t.Errorf("%v made a container", args)
		}
		m.Close()
		ended(t, r)
	}
}

// TestHostileMessages: nothing that comes over the control socket makes a
// monitor crash or hang; it always ends when the socket is closed.
func TestHostileMessages(t *testing.T) {
	e := executable(t)
	rng := rand.New(rand.NewPCG(3, 4))
	for round := range 20 {
		r := newRecorder()
		m, err := e.Spawn(t.TempDir(), r)
		if err != nil {
			t.Fatal(err)
		}
		for range 200 {
			b := make([]byte, rng.IntN(300))
			for i := range b {
				b[i] = byte(rng.IntN(256))
			}
			if len(b) >= hdrLen && rng.IntN(4) > 0 { // a good head
				binary.LittleEndian.PutUint16(b, ctlVersion)
				typ := uint16(1 + rng.IntN(14))
				if typ == uint16(ctlQuit) {
					typ = uint16(ctlState)
				}
				binary.LittleEndian.PutUint16(b[2:], typ)
				binary.LittleEndian.PutUint32(b[8:], uint32(len(b)-hdrLen))
				if typ == uint16(ctlClone) && len(b) >= hdrLen+16 {
					b = b[:hdrLen+16]
					binary.LittleEndian.PutUint32(b[8:], 16)
					binary.LittleEndian.PutUint64(b[hdrLen:], 0)
				}
				for i := hdrLen; i < len(b) && rng.IntN(2) == 0; i++ {
					b[i] = byte(rng.IntN(4)) // small numbers pass more checks
				}
			}
			var fds []int
			for range rng.IntN(5) {
				fds = append(fds, int(e.null.Fd()))
			}
			if err := m.c.send([][]byte{b}, fds); err != nil {
				break
			}
		}
		select {
		case <-r.gone:
			t.Fatalf("round %d: the monitor died", round)
		case <-time.After(time.Millisecond):
		}
		m.Kill() // one that took a start for good goes on, and rightly
		m.Close()
		ended(t, r)
	}
}
