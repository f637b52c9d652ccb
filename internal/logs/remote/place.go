package remote

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/logs"
)

// place is the cursor on disk, rewritten where it is: it is smaller than what a
// disk writes at once, and a damaged one means the beginning.
type place struct {
	f      *os.File
	cursor logs.Cursor
	synced time.Time
	dirty  bool
}

const syncEvery = 5 * time.Second

func openPlace(dir string) (*place, error) {
	f, err := os.OpenFile(filepath.Join(dir, "cursor"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the place in a log: %w", err)
	}
	p := &place{f: f, synced: time.Now()}
	b := make([]byte, 64)
	n, _ := f.ReadAt(b, 0)
	if c, err := logs.DecodeCursor(b[:n]); err == nil {
		p.cursor = c
	}
	return p, nil
}

func readCursor(dir string) (logs.Cursor, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cursor"))
	if err != nil {
		return logs.Cursor{}, err
	}
	return logs.DecodeCursor(b)
}

// save stores the cursor: for whoever kills the engine at once, for a power cut
// every few seconds and when idle.
func (p *place) save(c logs.Cursor, idle bool) error {
	if c != p.cursor {
		if _, err := p.f.WriteAt(c.Encode(), 0); err != nil {
			return err
		}
		p.cursor, p.dirty = c, true
	}
	if p.dirty && (idle || time.Since(p.synced) > syncEvery) {
		if idle && time.Since(p.synced) < syncEvery {
			return nil // soon again
		}
		p.dirty, p.synced = false, time.Now()
		return p.f.Sync()
	}
	return nil
}

func (p *place) close() {
	if p.dirty {
		_ = p.f.Sync()
	}
	p.f.Close()
}

// writeSource stores what is said about a log's container. It is on the way of a
// start: syncing is syncSource's.
func writeSource(dir string, src Source) error {
	b, err := json.Marshal(src)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, "source")
	if old, err := os.ReadFile(path); err == nil && string(old) == string(b) {
		return nil
	}
	if err := durable.WriteFile(path, b, 0o600, durable.Nothing); err != nil {
		return fmt.Errorf("cannot store a log's source: %w", err)
	}
	return nil
}

func syncSource(dir string) error {
	for _, p := range []string{filepath.Join(dir, "source"), dir, filepath.Dir(dir)} {
		f, err := os.Open(p)
		if err != nil {
			return err
		}
		err = errors.Join(f.Sync(), f.Close())
		if err != nil {
			return err
		}
	}
	return nil
}

// maxSource bounds the file; labels and variables are the user's.
const maxSource = 4 << 20

func readSource(dir string) (Source, error) {
	var s Source
	path := filepath.Join(dir, "source")
	fi, err := os.Stat(path)
	if err != nil {
		return s, fmt.Errorf("cannot read a log's source: %w", err)
	}
	if fi.Size() > maxSource {
		return s, errors.New("cannot read a log's source: it is too large")
	}
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		return s, fmt.Errorf("cannot read a log's source: %w", err)
	}
	return s, nil
}

// partials tells which records are pieces of one line.
type partials struct {
	id   string
	open [2]*Partial // the last piece seen of stdout and stderr
}

func (p *partials) entries(recs []logs.Record) []Entry {
	out := make([]Entry, 0, len(recs))
	for _, r := range recs {
		e := Entry{Time: r.Time, Stderr: r.Stream == "stderr", Line: r.Line}
		i := 0
		if e.Stderr {
			i = 1
		}
		whole := len(r.Line) > 0 && r.Line[len(r.Line)-1] == '\n'
		if whole {
			e.Line = r.Line[:len(r.Line)-1]
		}
		switch prev := p.open[i]; {
		case whole && prev == nil:
		case prev == nil:
			e.Partial = &Partial{ID: p.partialID(r, i), Ordinal: 1}
			p.open[i] = e.Partial
		default:
			e.Partial = &Partial{ID: prev.ID, Ordinal: prev.Ordinal + 1, Last: whole}
			p.open[i] = e.Partial
			if whole {
				p.open[i] = nil
			}
		}
		out = append(out, e)
	}
	return out
}

// partialID is the same whenever a line's first piece is sent again.
func (p *partials) partialID(r logs.Record, stream int) string {
	h := fnv.New128a()
	_, _ = h.Write([]byte(p.id))
	_ = binary.Write(h, binary.LittleEndian, [2]int64{r.Time.UnixNano(), int64(stream)})
	return hex.EncodeToString(h.Sum(nil))
}
