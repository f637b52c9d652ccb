package logs

import (
	"bytes"
	"encoding/json"
	"time"
)

// decoder makes a record of a line without its newline; ok is false for what
// is not a record.
type decoder func(line []byte) (r Record, ok bool)

var jsonStart = []byte(`{"log":`)

func decodeJSON(line []byte) (Record, bool) {
	if r, ok := parseJSON(line); ok {
		return r, true
	}
	// A crash may have cut a record off, and the next one begins on its line.
	for i := bytes.LastIndex(line, jsonStart); i > 0; i = bytes.LastIndex(line[:i], jsonStart) {
		if r, ok := parseJSON(line[i:]); ok {
			return r, true
		}
	}
	return Record{}, false
}

func parseJSON(line []byte) (Record, bool) {
	var j struct {
		Log    string    `json:"log"`
		Stream string    `json:"stream"`
		Time   time.Time `json:"time"`
	}
	if len(line) == 0 || line[0] != '{' || json.Unmarshal(line, &j) != nil || j.Time.IsZero() {
		return Record{}, false
	}
	return Record{Time: j.Time, Stream: j.Stream, Line: []byte(j.Log)}, true
}

// decodeK8s reads "TIME STREAM TAGS LINE"; tag P is a part of a line, F its end.
func decodeK8s(line []byte) (Record, bool) {
	stamp, rest, ok := bytes.Cut(line, []byte{' '})
	if !ok {
		return Record{}, false
	}
	stream, rest, ok := bytes.Cut(rest, []byte{' '})
	if !ok {
		return Record{}, false
	}
	tags, text, ok := bytes.Cut(rest, []byte{' '})
	if !ok || len(tags) == 0 {
		return Record{}, false
	}
	t, err := time.Parse(time.RFC3339Nano, string(stamp))
	if err != nil || string(stream) != "stdout" && string(stream) != "stderr" {
		return Record{}, false
	}
	r := Record{Time: t, Stream: string(stream)}
	if tags[0] == 'P' {
		r.Line = bytes.Clone(text)
	} else {
		r.Line = append(append(make([]byte, 0, len(text)+1), text...), '\n')
	}
	return r, true
}
