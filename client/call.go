package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strconv"
)

// Filters are Docker's: key to values.
type Filters map[string][]string

// Add adds a value.
func (f Filters) Add(key, value string) {
	if !slices.Contains(f[key], value) {
		f[key] = append(f[key], value)
	}
}

// encode gives the form of the query parameter, "" for none.
func (f Filters) encode() string {
	if len(f) == 0 {
		return ""
	}
	m := make(map[string]map[string]bool, len(f))
	for k, vs := range f {
		m[k] = make(map[string]bool, len(vs))
		for _, v := range vs {
			m[k][v] = true
		}
	}
	b, _ := json.Marshal(m)
	return string(b)
}

// values builds a query; empty values are left out.
func values(kv ...string) url.Values {
	v := url.Values{}
	for i := 0; i+1 < len(kv); i += 2 {
		if kv[i+1] != "" {
			v.Set(kv[i], kv[i+1])
		}
	}
	return v
}

func flag(b bool) string {
	if b {
		return "1"
	}
	return ""
}

func number(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// do sends r and decodes the answer into out (nil drops it).
func (c *Client) do(ctx context.Context, r *request, out any) error {
	resp, err := c.send(ctx, r)
	if err != nil {
		return err
	}
	defer resp.body.Close()
	if out == nil {
		_, err := io.Copy(io.Discard, io.LimitReader(resp.body, maxErrorBody))
		return err
	}
	if n := resp.header["content-length"]; n != "" {
		if size, err := strconv.Atoi(n); err == nil && size <= 64<<20 {
			b := make([]byte, size)
			if _, err := io.ReadFull(resp.body, b); err != nil {
				return err
			}
			return decodeErr(json.Unmarshal(b, out))
		}
	}
	return decodeErr(json.NewDecoder(resp.body).Decode(out))
}

func decodeErr(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("cannot read the engine's answer: %w", err)
}

func (c *Client) read(ctx context.Context, path string, q url.Values, out any) error {
	return c.do(ctx, &request{method: "GET", path: path, query: q}, out)
}

func (c *Client) post(ctx context.Context, path string, q url.Values, in, out any) error {
	return c.do(ctx, &request{method: "POST", path: path, query: q, json: in}, out)
}

func (c *Client) delete(ctx context.Context, path string, q url.Values, out any) error {
	return c.do(ctx, &request{method: "DELETE", path: path, query: q}, out)
}

// fetch is for objects that callers may want as the engine sent them.
func (c *Client) fetch(ctx context.Context, path string, q url.Values, out any) (json.RawMessage, error) {
	raw, err := c.raw(ctx, path, q)
	if err != nil {
		return nil, err
	}
	return raw, decodeErr(json.Unmarshal(raw, out))
}

// maxAnswer bounds an answer that is kept whole.
const maxAnswer = 256 << 20

// raw reads an answer as it is.
func (c *Client) raw(ctx context.Context, path string, q url.Values) (json.RawMessage, error) {
	resp, err := c.send(ctx, &request{method: "GET", path: path, query: q})
	if err != nil {
		return nil, err
	}
	defer resp.body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.body, maxAnswer))
	return b, decodeErr(err)
}

// each decodes a stream of JSON values until it ends or fn fails.
func each[T any](r io.Reader, fn func(T) error) error {
	dec := json.NewDecoder(r)
	for {
		var v T
		if err := dec.Decode(&v); err != nil {
			if err == io.EOF {
				return nil
			}
			return err
		}
		if err := fn(v); err != nil {
			return err
		}
	}
}
