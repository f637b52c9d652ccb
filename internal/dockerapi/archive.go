package dockerapi

import (
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const headerPathStat = "X-Docker-Container-Path-Stat"

func archivePath(r *request) (string, error) {
	p := r.query.Get("path")
	if p == "" {
		return "", fault.New(fault.Invalid, "bad parameter: path cannot be empty")
	}
	for i := 0; i < len(p); i++ {
		if p[i] == 0 {
			return "", fault.New(fault.Invalid, "bad parameter: path holds a NUL byte")
		}
	}
	return p, nil
}

// encodeStat is a path's stat as the header carries it.
func encodeStat(st container.PathStat) (string, error) {
	b, err := json.Marshal(st)
	return base64.StdEncoding.EncodeToString(b), err
}

func (a containersAPI) archiveHead(w *response, r *request) error {
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	st, err := a.b.ContainerStatPath(r.Context(), r.name, p)
	if err != nil {
		return err
	}
	h, err := encodeStat(st)
	if err != nil {
		return err
	}
	w.Header().Set(headerPathStat, h)
	w.WriteHeader(http.StatusOK)
	return nil
}

func (a containersAPI) archiveGet(w *response, r *request) error {
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	s := newStream(w, "application/x-tar", 0)
	defer s.end()
	err = a.b.ContainerGetArchive(r.Context(), r.name, p, func(st container.PathStat) (io.Writer, error) {
		h, err := encodeStat(st)
		s.header.Set(headerPathStat, h)
		return s, err
	})
	if err == nil {
		s.begin()
	}
	return err
}

func (a containersAPI) archivePut(w *response, r *request) error {
	p, err := archivePath(r)
	if err != nil {
		return err
	}
	if err := a.b.ContainerPutArchive(r.Context(), r.name, p, r.flag("noOverwriteDirNonDir"), r.flag("copyUIDGID"), r.Body); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}
