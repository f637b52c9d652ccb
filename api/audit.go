package api

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// AuditRecord is one line of the audit log, GET /servin/audit.
type AuditRecord struct {
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	// Event is "begin" and "end" of a call, "start" and "stop" of the engine, or
	// "drop" where old files were removed.
	Event string `json:"event"`
	// Call is the sequence number of the beginning that an end belongs to.
	Call uint64    `json:"call,omitempty"`
	Who  *AuditWho `json:"who,omitempty"`
	// Method is what was called, such as "POST /containers/{id}/start"; Object what
	// it was about.
	Method string            `json:"method,omitempty"`
	Object string            `json:"object,omitempty"`
	Attrs  map[string]string `json:"attrs,omitempty"`
	Status int               `json:"status,omitempty"`
	Error  string            `json:"error,omitempty"`
	// Millis is how long the call took.
	Millis float64 `json:"ms,omitempty"`
	// Prev is the hash of the record before, Hash that of this one.
	Prev string `json:"prev"`
	Hash string `json:"hash,omitempty"`
}

// AuditWho is who called.
type AuditWho struct {
	Edge    string  `json:"edge"`
	UID     *uint32 `json:"uid,omitempty"`
	GID     *uint32 `json:"gid,omitempty"`
	PID     uint32  `json:"pid,omitempty"`
	Program string  `json:"program,omitempty"`
	Subject string  `json:"subject,omitempty"`
	Address string  `json:"address,omitempty"`
}

// AuditGenesis is the Prev of the first record.
var AuditGenesis = strings.Repeat("0", 64)

// AuditCut is an attribute of a record "start": what of the log before it was missing
// although it had been noted.
const AuditCut = "cut"

const auditHash = `,"hash":"`

// Seal writes the record as a line whose hash covers everything before it on the
// line, Prev among it.
func (r *AuditRecord) Seal() ([]byte, error) {
	r.Hash = ""
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	b = b[:len(b)-1] // the closing brace
	sum := sha256.Sum256(b)
	r.Hash = hex.EncodeToString(sum[:])
	b = append(b, auditHash...)
	b = append(b, r.Hash...)
	return append(b, "\"}\n"...), nil
}

// OpenAudit reads a line and checks its hash.
func OpenAudit(line []byte) (AuditRecord, error) {
	var r AuditRecord
	line = bytes.TrimSuffix(line, []byte("\n"))
	tail := len(auditHash) + 64 + 2
	if len(line) < tail || string(line[len(line)-tail:len(line)-66]) != auditHash || string(line[len(line)-2:]) != `"}` {
		return r, errors.New("it does not end in a hash")
	}
	sum := sha256.Sum256(line[:len(line)-tail])
	if hex.EncodeToString(sum[:]) != string(line[len(line)-66:len(line)-2]) {
		return r, errors.New("its hash is not that of its content")
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return r, errors.New("it is no record")
	}
	return r, nil
}

// AuditHead is the end of the log as its writer last noted it.
type AuditHead struct {
	Seq  uint64
	Hash string
}

// AuditReport is what verifying the log found: the answer of GET
// /servin/audit/verify.
type AuditReport struct {
	Records     uint64
	First, Last uint64
	// Head is the hash of the last record. Kept elsewhere, it shows later whether
	// the log up to there was rewritten as a whole.
	Head     string
	Problems []string
}

// AuditVerifier checks lines in their order.
type AuditVerifier struct {
	Report  AuditReport
	prev    string
	seq     uint64
	hashes  map[uint64]string // of what Expect asked for
	want    []AuditHead
	through uint64 // of the latest "drop"
}

const maxAuditProblems = 100

func (v *AuditVerifier) problem(format string, args ...any) {
	if len(v.Report.Problems) < maxAuditProblems {
		v.Report.Problems = append(v.Report.Problems, fmt.Sprintf(format, args...))
	}
}

// Expect adds a record that the log must hold: a head that was noted earlier.
func (v *AuditVerifier) Expect(h AuditHead) { v.want = append(v.want, h) }

// Line takes the next one.
func (v *AuditVerifier) Line(line []byte) {
	r, err := OpenAudit(line)
	if err != nil {
		v.problem("after record %d: %v", v.seq, err)
		v.prev = "" // what follows can be checked against nothing
		return
	}
	first := v.Report.Records == 0
	v.Report.Records++
	switch {
	case first:
		v.Report.First = r.Seq
		if r.Seq == 1 && r.Prev != AuditGenesis {
			v.problem("record 1 is not the first of a log")
		}
	case r.Seq != v.seq+1:
		v.problem("records %d to %d are missing or in another order", v.seq+1, r.Seq)
	case v.prev != "" && r.Prev != v.prev:
		v.problem("record %d does not follow record %d: its predecessor was changed", r.Seq, v.seq)
	}
	for _, h := range v.want {
		if h.Seq == r.Seq {
			if v.hashes == nil {
				v.hashes = map[uint64]string{}
			}
			v.hashes[r.Seq] = r.Hash
		}
	}
	if cut := r.Attrs[AuditCut]; r.Event == "start" && cut != "" {
		v.problem("before record %d: %s", r.Seq, cut)
	}
	if r.Event == "drop" {
		if _, err := fmt.Sscan(r.Attrs["through"], &v.through); err != nil {
			v.problem("record %d does not say what was dropped", r.Seq)
		}
	}
	v.prev, v.seq = r.Hash, r.Seq
	v.Report.Last, v.Report.Head = r.Seq, r.Hash
}

// End gives the result.
func (v *AuditVerifier) End() AuditReport {
	// Files that were dropped may still be there: said first, removed behind.
	if v.Report.Records > 0 && v.Report.First > v.through+1 {
		v.problem("the log begins with record %d, but only what came up to %d was dropped", v.Report.First, v.through)
	}
	for _, h := range v.want {
		switch got, ok := v.hashes[h.Seq]; {
		case h.Seq == 0 || h.Seq < v.Report.First:
		case !ok:
			v.problem("record %d is missing: the end of the log was cut off", h.Seq)
		case got != h.Hash:
			v.problem("record %d is not the one that was written: the log was rewritten", h.Seq)
		}
	}
	return v.Report
}
