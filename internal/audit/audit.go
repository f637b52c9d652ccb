// Package audit keeps the log of calls: an append-only file of JSON lines in which
// each record holds the hash of the one before it, so that a change, a removal or
// a cut shows (package api seals and verifies).
//
// A call has two records. Its *beginning*, with who asked for what, is written when
// the call arrives and synced while the call is carried out; the edge sends no byte
// of an answer before that sync has ended (Entry.Durable). Its *end*, with the
// outcome, is written behind the answer and synced within a second. So a crash loses
// no call that somebody got an answer to, and at most the outcomes of the last
// second. Whoever waits for a sync shares it with everybody who asked meanwhile.
//
// The edges (package dockerapi, package criapi) import it.
package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/caller"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// Sync says when records reach the disk.
type Sync string

// The policies.
const (
	// SyncCalls syncs the beginning of a call before it is answered.
	SyncCalls Sync = "calls"
	// SyncSecond syncs once a second; a crash loses that much.
	SyncSecond Sync = "second"
)

const (
	prefix, suffix = "audit-", ".log"
	headFile       = "head"
	lazily         = time.Second // between syncs that nobody waits for

	maxText  = 256 // of an attribute or error
	maxAttrs = 32
	maxLine  = 64 << 10
)

// Config of a log.
type Config struct {
	Dir string
	// Reads are recorded too.
	Reads bool
	// Sync is SyncCalls by default.
	Sync Sync
	// Required writes and syncs the beginning of a call before the call is carried
	// out, and refuses it where that fails. Else a log that cannot be written (a
	// full disk) holds nobody up: what is missing is counted and told.
	Required bool
	// MaxSize rotates a file at that size (32 MiB by default), MaxFiles are kept (16).
	MaxSize  int64
	MaxFiles int
	Logger   *slog.Logger
}

// Log is an open audit log. All methods are safe for concurrent use, and for a nil
// log, which records nothing.
type Log struct {
	c   Config
	log *slog.Logger

	queue  chan *line
	done   chan struct{}
	closed sync.RWMutex // held for reading while something is queued
	shut   bool
	tasks  sync.WaitGroup

	mu     sync.Mutex
	notify chan struct{} // closed when something was written
	failed error         // of the last write, nil when it went well
	lost   int           // records that could not be written

	// A read beside a write may see half of each: the kernel makes neither whole.
	headMu sync.Mutex
	head   *os.File

	// The writer's own.
	f    *os.File
	size int64
	seq  uint64
	prev string
}

// line is a record on its way.
type line struct {
	rec api.AuditRecord
	// begun gives an entry its number.
	begun *Entry
	sync  bool
	// flush asks for nothing but a sync.
	flush bool
	err   error
	done  chan struct{}
}

// Open opens the log and continues its chain.
func Open(c Config) (*Log, error) {
	if c.Sync == "" {
		c.Sync = SyncCalls
	}
	if c.MaxSize <= 0 {
		c.MaxSize = 32 << 20
	}
	if c.MaxFiles <= 0 {
		c.MaxFiles = 16
	}
	l := &Log{c: c, log: c.Logger, queue: make(chan *line, 256), done: make(chan struct{}), notify: make(chan struct{}), prev: api.AuditGenesis}
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	attrs, err := l.open()
	if err == nil {
		err = l.compare(attrs)
	}
	if err != nil {
		return nil, fault.New(fault.Of(err), "cannot open the audit log: %w", err)
	}
	go l.write()
	l.enqueue(&line{rec: api.AuditRecord{Time: time.Now().UTC(), Event: "start", Attrs: attrs}, done: make(chan struct{})})
	return l, nil
}

// files lists the log's files, the oldest first.
func (l *Log) files() ([]string, error) {
	list, err := os.ReadDir(l.c.Dir)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, f := range list {
		if n := f.Name(); f.Type().IsRegular() && strings.HasPrefix(n, prefix) && strings.HasSuffix(n, suffix) {
			out = append(out, n)
		}
	}
	slices.Sort(out) // numbers have their zeros
	return out, nil
}

func fileName(seq uint64) string { return fmt.Sprintf("%s%020d%s", prefix, seq, suffix) }

// open finds the end of the chain. What a crash left of a line is cut off.
func (l *Log) open() (attrs map[string]string, err error) {
	if err := os.MkdirAll(l.c.Dir, 0o700); err != nil {
		return nil, err
	}
	if l.head, err = os.OpenFile(filepath.Join(l.c.Dir, headFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	names, err := l.files()
	if err != nil {
		return nil, err
	}
	attrs = map[string]string{}
	if len(names) == 0 {
		return attrs, l.begin()
	}
	last := names[len(names)-1]
	if l.f, err = os.OpenFile(filepath.Join(l.c.Dir, last), os.O_RDWR|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	st, err := l.f.Stat()
	if err != nil {
		return nil, err
	}
	// The last lines: enough for one whole record.
	from := max(st.Size()-2*maxLine, 0)
	tail := make([]byte, st.Size()-from)
	if _, err := l.f.ReadAt(tail, from); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	l.size = st.Size()
	if i := strings.LastIndexByte(string(tail), '\n'); i+1 < len(tail) {
		torn := len(tail) - i - 1
		attrs["torn"] = strconv.Itoa(torn) + " bytes of a record that a crash cut short"
		if err := l.f.Truncate(st.Size() - int64(torn)); err != nil {
			return nil, err
		}
		l.size -= int64(torn)
		tail = tail[:i+1]
	}
	if len(tail) == 0 {
		// A rotation's file without its first record: its name says where the chain is.
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(last, prefix), suffix), 10, 64)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("%s has a name that is not ours", last)
		}
		l.seq = n - 1
		if len(names) > 1 {
			return attrs, l.continueFrom(names[len(names)-2], attrs)
		}
		return attrs, nil
	}
	body := tail[:len(tail)-1]
	rec, err := api.OpenAudit(body[strings.LastIndexByte(string(body), '\n')+1:])
	if err != nil {
		// Somebody wrote into it. Go on, in a file of its own, and say so.
		l.log.Error("the last record of the audit log was changed; a new file begins", "file", last, "cause", err)
		attrs["damaged"] = last + ": " + err.Error()
		if h, ok := l.readHead(); ok {
			l.seq, l.prev = h.Seq, h.Hash
		}
		_ = l.f.Close()
		return attrs, l.begin()
	}
	l.seq, l.prev = rec.Seq, rec.Hash
	return attrs, nil
}

// compare holds the end of the chain against the note of it: from here on the note is
// of what follows, so what is missing is said in the chain itself.
func (l *Log) compare(attrs map[string]string) error {
	h, ok := l.readHead()
	switch {
	case !ok && l.seq == 0: // a new log, whose note must not be missing after a power cut
		l.headMu.Lock()
		defer l.headMu.Unlock()
		if _, err := l.head.WriteAt(noted(0, l.prev), 0); err != nil {
			return err
		}
		return errors.Join(l.head.Sync(), syncDir(l.c.Dir))
	case !ok:
		attrs[api.AuditCut] = "the note of the log's head was missing or changed"
	case h.Seq > l.seq:
		attrs[api.AuditCut] = fmt.Sprintf("records %d to %d, which had been noted, were missing: the end of the log was cut off, or the machine stopped before it was on the disk", l.seq+1, h.Seq)
	case h.Seq > 0 && h.Seq == l.seq && h.Hash != l.prev:
		attrs[api.AuditCut] = fmt.Sprintf("record %d was not the one that had been noted: the log was rewritten", h.Seq)
	default:
		return nil
	}
	l.log.Error("the audit log is not as it was left", "cause", attrs[api.AuditCut])
	return nil
}

// noted is the note of the log's head.
func noted(seq uint64, hash string) []byte { return fmt.Appendf(nil, "%020d %s\n", seq, hash) }

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (l *Log) continueFrom(name string, attrs map[string]string) error {
	b, err := os.ReadFile(filepath.Join(l.c.Dir, name))
	if err != nil {
		return err
	}
	body := strings.TrimSuffix(string(b), "\n")
	rec, err := api.OpenAudit([]byte(body[strings.LastIndexByte(body, '\n')+1:]))
	if err != nil {
		attrs["damaged"] = name + ": " + err.Error()
		return nil
	}
	l.seq, l.prev = rec.Seq, rec.Hash
	return nil
}

func (l *Log) readHead() (api.AuditHead, bool) {
	var h api.AuditHead
	b := make([]byte, 128)
	l.headMu.Lock()
	n, _ := l.head.ReadAt(b, 0)
	l.headMu.Unlock()
	if _, err := fmt.Sscanf(string(b[:n]), "%d %64s\n", &h.Seq, &h.Hash); err != nil || len(h.Hash) != 64 {
		return h, false
	}
	return h, true
}

// begin makes the next file.
func (l *Log) begin() error {
	name := fileName(l.seq + 1)
	f, err := os.OpenFile(filepath.Join(l.c.Dir, name), os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) { // damaged at its first record
		if err = os.Rename(filepath.Join(l.c.Dir, name), filepath.Join(l.c.Dir, "damaged-"+time.Now().UTC().Format("20060102T150405.000")+"-"+name)); err == nil {
			f, err = os.OpenFile(filepath.Join(l.c.Dir, name), os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL, 0o600)
		}
	}
	if err != nil {
		return err
	}
	if err := syncDir(l.c.Dir); err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, 0
	return nil
}

// enqueue hands a line to the writer; false once the log is closed.
func (l *Log) enqueue(x *line) bool {
	l.closed.RLock()
	defer l.closed.RUnlock()
	if l.shut {
		return false
	}
	l.queue <- x
	return true
}

// write is the only writer.
func (l *Log) write() {
	defer close(l.done)
	idle := time.NewTimer(time.Hour)
	idle.Stop()
	dirty := false
	var group []*line
	for {
		var first *line
		var ok bool
		select {
		case first, ok = <-l.queue:
			if !ok {
				if dirty {
					_ = l.f.Sync()
				}
				return
			}
		case <-idle.C:
			if dirty {
				l.result(l.f.Sync(), 0)
				dirty = false
			}
			continue
		}
		group = append(group[:0], first)
	drain:
		for len(group) < 512 {
			select {
			case x, more := <-l.queue:
				if !more {
					break drain // the next round sees it
				}
				group = append(group, x)
			default:
				break drain
			}
		}
		sync := false
		for _, x := range group {
			sync = sync || x.sync && l.c.Sync == SyncCalls || x.flush
		}
		err := l.append(group)
		if err == nil && sync {
			err = l.f.Sync()
			dirty = false
			idle.Stop()
		} else if err == nil && !dirty {
			dirty = true
			idle.Reset(lazily)
		}
		l.result(err, len(group))
		for i, x := range group {
			x.err = err
			close(x.done)
			group[i] = nil
		}
		if err == nil && l.size >= l.c.MaxSize {
			if err := l.rotate(); err != nil {
				l.log.Error("cannot rotate the audit log", "cause", err)
			}
			dirty = false
		}
	}
}

// append writes lines at the end of the file, all or none.
func (l *Log) append(group []*line) error {
	var b []byte
	seq, prev := l.seq, l.prev
	for _, x := range group {
		if x.flush {
			continue
		}
		seq++
		x.rec.Seq, x.rec.Prev = seq, prev
		text, err := x.rec.Seal()
		if err != nil {
			return err
		}
		prev = x.rec.Hash
		if x.begun != nil {
			x.begun.seq = seq
		}
		b = append(b, text...)
	}
	if len(b) == 0 {
		return nil
	}
	n, err := l.f.Write(b)
	if err != nil {
		if n > 0 {
			err = errors.Join(err, l.f.Truncate(l.size))
		}
		return err
	}
	l.size += int64(n)
	l.seq, l.prev = seq, prev
	// Not synced: it may lag behind after a crash. Ahead it can be after a power cut only.
	l.headMu.Lock()
	_, err = l.head.WriteAt(noted(seq, prev), 0)
	l.headMu.Unlock()
	if err != nil {
		l.log.Warn("cannot note the head of the audit log", "cause", err)
	}
	return nil
}

// result keeps in mind how writing went, and wakes readers.
func (l *Log) result(err error, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		if l.failed == nil {
			l.log.Error("cannot write the audit log", "cause", err)
		}
		l.failed = err
		l.lost += n
		return
	}
	if l.failed != nil {
		l.failed = nil
		x := &line{rec: api.AuditRecord{Event: "lost", Time: time.Now().UTC(), Attrs: map[string]string{"records": strconv.Itoa(l.lost)}}, done: make(chan struct{})}
		l.tasks.Go(func() { l.enqueue(x) }) // the writer must not wait for itself
		l.lost = 0
	}
	close(l.notify)
	l.notify = make(chan struct{})
}

// rotate begins a new file and removes the oldest ones; the chain goes on.
func (l *Log) rotate() error {
	if err := l.f.Sync(); err != nil {
		return err
	}
	old := l.f
	if err := l.begin(); err != nil {
		l.f = old
		return err
	}
	_ = old.Close()
	names, err := l.files()
	if err != nil || len(names) <= l.c.MaxFiles {
		return err
	}
	drop := names[:len(names)-l.c.MaxFiles]
	next := names[len(drop)]
	first, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(next, prefix), suffix), 10, 64)
	if err != nil {
		return err
	}
	// Said first: a file that is gone without a word was taken by somebody else.
	x := &line{rec: api.AuditRecord{Event: "drop", Time: time.Now().UTC(), Attrs: map[string]string{"through": strconv.FormatUint(first-1, 10)}}}
	if err := l.append([]*line{x}); err != nil {
		return err
	}
	if err := l.f.Sync(); err != nil {
		return err
	}
	for _, n := range drop {
		err = errors.Join(err, os.Remove(filepath.Join(l.c.Dir, n)))
	}
	return err
}

// Close notes the end and closes the log.
func (l *Log) Close() error {
	if l == nil {
		return nil
	}
	l.tasks.Wait()
	l.enqueue(&line{rec: api.AuditRecord{Event: "stop", Time: time.Now().UTC()}, sync: true, done: make(chan struct{})})
	l.tasks.Wait()
	l.closed.Lock()
	l.shut = true
	close(l.queue)
	l.closed.Unlock()
	<-l.done
	return errors.Join(l.f.Close(), l.head.Close())
}

// Call is what somebody asks for.
type Call struct {
	Method, Object string
	Attrs          map[string]string
	// Read changes nothing.
	Read bool
}

// Entry is a call that is being carried out. A nil one records nothing.
type Entry struct {
	l     *Log
	begin *line
	at    time.Time
	seq   uint64

	mu    sync.Mutex
	attrs map[string]string
}

// Begin notes that a call arrived. Reads are noted if the log is to hold them. It
// fails only where the log is required and cannot be written.
func (l *Log) Begin(ctx context.Context, c Call) (*Entry, error) {
	if l == nil || c.Read && !l.c.Reads {
		return nil, nil
	}
	e := &Entry{l: l, at: time.Now()}
	e.begin = &line{begun: e, sync: !c.Read, done: make(chan struct{}), rec: api.AuditRecord{
		Time: e.at.UTC(), Event: "begin", Who: who(caller.From(ctx)), Method: text(c.Method), Object: text(c.Object), Attrs: attrs(c.Attrs),
	}}
	if !l.enqueue(e.begin) {
		return nil, nil
	}
	if l.c.Required && !c.Read {
		<-e.begin.done
		if err := e.begin.err; err != nil {
			return nil, fault.New(fault.Unavailable, "cannot do this: the audit log cannot be written: %w", err)
		}
	}
	return e, nil
}

// Durable returns once the beginning is where the log's policy wants it.
func (e *Entry) Durable() {
	if e != nil && e.begin.sync && e.l.c.Sync == SyncCalls {
		<-e.begin.done
	}
}

// Note adds what was found out about the call to its end.
func (e *Entry) Note(key, value string) {
	if e == nil || value == "" {
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.attrs == nil {
		e.attrs = map[string]string{}
	}
	if len(e.attrs) < maxAttrs {
		e.attrs[key] = text(value)
	}
}

// End notes the outcome: a status as of HTTP, and the error's text if there is one.
func (e *Entry) End(status int, err error) {
	if e == nil {
		return
	}
	e.mu.Lock()
	noted := maps.Clone(e.attrs)
	e.mu.Unlock()
	now := time.Now()
	rec := api.AuditRecord{
		Time: now.UTC(), Event: "end", Method: e.begin.rec.Method, Object: e.begin.rec.Object, Attrs: noted, Status: status,
		Millis: float64(now.Sub(e.at).Microseconds()) / 1000,
	}
	if err != nil {
		rec.Error = text(err.Error())
	}
	x := &line{rec: rec, done: make(chan struct{})}
	// The beginning was queued first; its number is known when it was written.
	select {
	case <-e.begin.done:
		x.rec.Call = e.seq
		e.l.enqueue(x)
	default:
		e.l.tasks.Go(func() {
			<-e.begin.done
			x.rec.Call = e.seq
			e.l.enqueue(x)
		})
	}
}

// Do records a call around fn, for edges that answer by returning: interceptors of
// gRPC servers. The status is 200, or what statusOf makes of the error.
func (l *Log) Do(ctx context.Context, c Call, statusOf func(error) int, fn func(ctx context.Context) error) error {
	e, err := l.Begin(ctx, c)
	if err != nil {
		return err
	}
	err = fn(ctx)
	status := 200
	if err != nil {
		status = statusOf(err)
	}
	e.End(status, err)
	e.Durable()
	return err
}

// text bounds what others wrote.
func text(s string) string {
	if len(s) <= maxText {
		return strings.ToValidUTF8(s, "\ufffd")
	}
	s = s[:maxText]
	for !utf8.ValidString(s) && len(s) > maxText-4 {
		s = s[:len(s)-1]
	}
	return strings.ToValidUTF8(s, "\ufffd") + "…"
}

func attrs(m map[string]string) map[string]string {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]string, len(m))
	for k, v := range m {
		if len(out) < maxAttrs {
			out[text(k)] = text(v)
		}
	}
	return out
}

// program is the name that a process gives itself.
func program(pid uint32) string {
	b, err := os.ReadFile("/proc/" + strconv.FormatUint(uint64(pid), 10) + "/comm")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(string(b), "\n")
}

func who(c caller.Caller) *api.AuditWho {
	w := &api.AuditWho{Edge: c.Edge, Subject: text(c.Subject), Address: c.Address}
	if c.Local {
		w.UID, w.GID, w.PID = &c.UID, &c.GID, c.PID
		w.Program = text(program(c.PID))
	}
	return w
}
